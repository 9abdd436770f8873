"""The one thread on which tails are asked, and the clients' places at it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart, Traffic
from polyrank.transport.layout import Limits
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.client_slots import Call, ClientSlot, ServerGroup
from polyrank.transport.remote.server_stream import ServerStream, Terms
from polyrank.transport.remote.sessions import Work
from polyrank.transport.serving import Serving

T = TypeVar("T")
log = logging.getLogger(__name__)


class Scheduler:
    """Serves the frames of one round's clients; a `Floor`.

    Everything that touches a tail runs on one thread, from `start` to `stop`. Who does not come in
    time, or is then silent for longer than its terms say, leaves. A tail that raises ends the work
    of its clients and is asked no more; the others go on. At most `streams` clients have a stream
    at a time. `clock` is in seconds.
    """

    def __init__(self, clock: Callable[[], float], streams: int) -> None:
        self._clock, self._streams = clock, streams
        self._places: dict[str, ClientSlot] = {}
        self._tables: list[ServerGroup] = []
        self._calls: deque[Call] = deque()
        self._leaving: deque[ClientSlot] = deque()
        self._changed = threading.Condition()
        self._stopped = True
        self._thread = threading.Thread(target=self._work, name="split tails", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._stopped = False
        self._thread.start()

    def stop(self) -> None:
        """Let the thread finish what it is at, and end it."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def seat(
        self,
        tails: Sequence[tuple[ServerPart, Sequence[str]]],
        works: Mapping[str, Work],
        limits: Mapping[str, Limits],
        gathering: Callable[[Collection[str]], Batcher],
        terms: Mapping[str, Terms],
        seconds: float,
    ) -> None:
        """Begin a round with these tails, each with its clients; the round before is forgotten.

        Clients are to come within so many seconds.
        """
        until = self._clock() + seconds
        with self._changed:
            self._tables, self._places = [], {}
            for tail, clients in tails:
                names = tuple(clients)
                serving = Serving(tail, limits[names[0]], {one: limits[one] for one in names})
                table = ServerGroup(serving, gathering(names), names)
                self._tables.append(table)
                for one in names:
                    self._places[one] = ClientSlot(table, terms[one], works[one], until)

    def call(self, fn: Callable[[], T]) -> T:
        """Run a function on the thread, between two requests; return or raise what it does."""
        if threading.current_thread() is self._thread:
            return fn()
        call = Call(fn)
        with self._changed:
            if self._stopped:
                raise FrameError("split server: it is not running; start it first")
            self._calls.append(call)
            self._changed.notify_all()
        call.done.wait()
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]

    def leave(self, client: str, reason: str) -> None:
        """End the work of a client that is still at it, and wait until its tail has let it go."""
        with self._changed:
            place = self._place(client)
            self._end(place, reason, reason)
        self.call(lambda: None)

    def leave_all(self, reason: str) -> None:
        """End the work of all, and wait until the thread rests."""
        with self._changed:
            for place in self._places.values():
                self._end(place, reason, None)
        self.call(lambda: None)

    def traffic(self, client: str) -> Traffic:
        """Return the bytes of all frames of a client that came and that were written."""
        with self._changed:
            place = self._place(client)
            return Traffic(place.up, place.down)

    def failed(self, client: str) -> str | None:
        """Return why a client's work was ended against its will, or None."""
        with self._changed:
            return self._place(client).failure

    def enter(self, stream: ServerStream, work: Work) -> Terms | str | None:
        """Take a stream in as its client's only one; see `Floor`."""
        with self._changed:
            place = self._places.get(work.client)
            if place is None or place.work != work:
                return "the round has ended"
            if place.over is not None:
                return place.over
            others = sum(
                one.stream is not None for one in self._places.values() if one is not place
            )
            if others >= self._streams:
                return None
            old, place.stream = place.stream, stream
            place.heard(self._clock())

            def count(nbytes: int) -> None:
                with self._changed:
                    place.down += nbytes

            stream.count = count
            stream.welcome(work.client, place.terms)
            place.table.gathering.connect(work.client)
            self._changed.notify_all()
        if old is not None:
            old.cut()
        return place.terms

    def heard(self, stream: ServerStream) -> None:
        """Take note that something came."""
        with self._changed:
            place = self._places.get(stream.client)
            if place is not None and place.stream is stream:
                place.heard(self._clock())

    def add(self, stream: ServerStream, frame: bytes) -> None:
        """Take in a request; one of a stream that is not its client's newest is dropped."""
        with self._changed:
            place = self._places.get(stream.client)
            if place is not None and place.stream is stream and place.over is None:
                place.up += len(frame)
                place.table.gathering.add(stream.client, frame, self._clock())
                self._changed.notify_all()

    def bye(self, stream: ServerStream, failure: str | None) -> None:
        """Take note that a client leaves for good, or is put out for a reason."""
        with self._changed:
            place = self._places.get(stream.client)
            if place is not None and place.stream is stream:
                self._end(place, failure or "the client has left", failure)

    def gone(self, stream: ServerStream) -> None:
        """Take note that a stream has broken; its client may come back."""
        with self._changed:
            place = self._places.get(stream.client)
            if place is not None and place.stream is stream:
                place.stream = None
                place.table.gathering.disconnect(stream.client)
                self._changed.notify_all()

    def _place(self, client: str) -> ClientSlot:
        if client not in self._places:
            raise FrameError(
                f"split server: there is no client {client!r} in this round; there are "
                f"{sorted(self._places)[:5]}"
            )
        return self._places[client]

    def _end(self, place: ClientSlot, reason: str, failure: str | None) -> None:
        """End a client's work, if it is not over; its tail lets it go on the thread."""
        if place.over is not None:
            return
        place.over, place.failure = reason, failure
        if place.stream is not None:
            place.stream.end(reason)
            place.stream = None
        place.table.gathering.leave(place.work.client)
        self._leaving.append(place)
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                todo = self._next()
                while todo is None and not self._stopped:
                    self._changed.wait(self._soonest())
                    todo = self._next()
                if todo is None:
                    return
            todo()

    def _next(self) -> Callable[[], None] | None:
        """Return what is to be done now: who leaves goes before who asks, and asking goes last."""
        now = self._clock()
        for place in self._places.values():
            if place.over is None and now > place.until:
                self._end(place, place.silence, place.silence)
        if self._leaving:
            left = self._leaving.popleft()
            return lambda: self._let_go(left)
        if self._calls:
            call = self._calls.popleft()
            return call.carry_out
        for table in self._tables:
            if table.gathering.wait(now) == 0.0:
                self._tables.remove(table)  # the others come first next time
                self._tables.append(table)
                return lambda: self._serve(table)
        return None

    def _soonest(self) -> float | None:
        """Return how many seconds there are until something is to be done that time brings."""
        now = self._clock()
        waits = [table.gathering.wait(now) for table in self._tables]
        waits += [
            max(0.0, place.until - now) + 0.001
            for place in self._places.values()
            if place.over is None
        ]
        return min((wait for wait in waits if wait is not None), default=None)

    def _serve(self, table: ServerGroup) -> None:
        with self._changed:
            taken = table.gathering.take()
            streams = {one: self._places[one].stream for one in table.clients}
        try:
            for client in taken.forgotten:
                table.serving.forget(client)
            replies = table.serving.answer(taken.frames)
        except Exception as error:
            self._drop(table, error)
            return
        with self._changed:
            table.gathering.hold(table.serving.waiting)
        for client, reply in replies:
            stream = streams[client]
            if stream is not None:  # one that was replaced meanwhile drops it
                stream.reply(reply)

    def _let_go(self, place: ClientSlot) -> None:
        if place.table.failed:
            return
        try:
            place.table.serving.leave(place.work.client)
        except Exception as error:
            self._drop(place.table, error)

    def _drop(self, table: ServerGroup, error: Exception) -> None:
        """Give up a tail that has raised, and the work of its clients."""
        log.error("the tail of %s has failed", ", ".join(table.clients), exc_info=error)
        with self._changed:
            table.failed = True
            for client in table.clients:
                place = self._places[client]
                if place.over is None:
                    reason = "the tail failed at the server; its log says why"
                    self._end(place, reason, f"the tail failed: {type(error).__name__}: {error}")
