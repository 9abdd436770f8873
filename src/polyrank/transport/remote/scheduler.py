"""The one thread on which server parts are called, and the state of the round's clients."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.training.split.link import ServerPart
from polyrank.transport.layout import FrameLimits
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.client_slots import ClientSlot, ScheduledCall, ServerGroup
from polyrank.transport.remote.server_stream import ServerStream, StreamLimits
from polyrank.transport.remote.sessions import SessionId
from polyrank.transport.serving import FrameServer

T = TypeVar("T")
log = logging.getLogger(__name__)


class Scheduler:
    """Serves the frames of one round's clients: a `StreamHandler`.

    Every call of a server part runs on one thread, from `start` to `stop`. A client that does not
    connect in time, or then sends nothing for longer than its limits allow, has left. A server part
    that raises ends the work of its clients and is not called again; other groups go on. At most
    `streams` clients have a stream at a time. `clock` is in seconds.
    """

    def __init__(self, clock: Callable[[], float], streams: int) -> None:
        self._clock, self._streams = clock, streams
        self._slots: dict[str, ClientSlot] = {}
        self._groups: list[ServerGroup] = []
        self._calls: deque[ScheduledCall] = deque()
        self._leaving: deque[ClientSlot] = deque()
        self._changed = threading.Condition()
        self._stopped = True
        self._thread = threading.Thread(target=self._run, name="split server parts", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._stopped = False
        self._thread.start()

    def stop(self) -> None:
        """Let the thread finish what it is doing, and end it."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def start_round(
        self,
        server_parts: Sequence[tuple[ServerPart, Sequence[str]]],
        sessions: Mapping[str, SessionId],
        frame_limits: Mapping[str, FrameLimits],
        stream_limits: Mapping[str, StreamLimits],
        batcher: Callable[[Collection[str]], Batcher],
        seconds: float,
    ) -> None:
        """Begin a round with these server parts and their clients, in slot of the last round.

        Clients must connect within `seconds`.
        """
        deadline = self._clock() + seconds
        with self._changed:
            self._groups, self._slots = [], {}
            for server_part, clients in server_parts:
                names = tuple(clients)
                server = FrameServer(server_part, frame_limits)
                group = ServerGroup(server, batcher(names), names)
                self._groups.append(group)
                for name in names:
                    limits, session = stream_limits[name], sessions[name]
                    self._slots[name] = ClientSlot(group, limits, session, deadline)

    def call(self, fn: Callable[[], T]) -> T:
        """Run a function on the thread, between two requests; return or raise what it does."""
        if threading.current_thread() is self._thread:
            return fn()
        call = ScheduledCall(fn)
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
        """End a client's work, if it has not ended, and wait until its server part knows."""
        with self._changed:
            slot = self._slot(client)
            self._end(slot, reason, reason)
        self.call(lambda: None)

    def leave_all(self, reason: str) -> None:
        """End the work of all clients, and wait until the thread is idle."""
        with self._changed:
            for slot in self._slots.values():
                self._end(slot, reason, None)
        self.call(lambda: None)

    def traffic(self, client: str) -> WireBytes:
        """Return the bytes of all frames of a client that came and that were written."""
        with self._changed:
            slot = self._slot(client)
            return WireBytes(slot.up, slot.down)

    def failed(self, client: str) -> str | None:
        """Return why a client's work was ended against its will, or None."""
        with self._changed:
            return self._slot(client).failure

    def admit(self, stream: ServerStream, session: SessionId) -> StreamLimits | str | None:
        """Make a stream its client's only one; see `StreamHandler`."""
        with self._changed:
            slot = self._slots.get(session.client)
            if slot is None or slot.session != session:
                return "the round has ended"
            if slot.ended is not None:
                return slot.ended
            others = [other for other in self._slots.values() if other is not slot]
            if sum(other.stream is not None for other in others) >= self._streams:
                return None
            old, slot.stream = slot.stream, stream
            slot.heard(self._clock())

            def count(nbytes: int) -> None:
                with self._changed:
                    slot.down += nbytes

            stream.count = count
            stream.welcome(session.client, slot.limits)
            slot.group.batcher.connect(session.client)
            self._changed.notify_all()
        if old is not None:
            old.abort()
        return slot.limits

    def heard(self, stream: ServerStream) -> None:
        """Note that the client has sent something."""
        with self._changed:
            slot = self._slots.get(stream.client)
            if slot is not None and slot.stream is stream:
                slot.heard(self._clock())

    def submit(self, stream: ServerStream, frame: bytes) -> None:
        """Queue a request; that of a stream that is not its client's newest is dropped."""
        with self._changed:
            slot = self._slots.get(stream.client)
            if slot is not None and slot.stream is stream and slot.ended is None:
                slot.up += len(frame)
                slot.group.batcher.add(stream.client, frame, self._clock())
                self._changed.notify_all()

    def bye(self, stream: ServerStream, failure: str | None) -> None:
        """End the work of a client that has said Bye or broken the protocol (`failure`)."""
        with self._changed:
            slot = self._slots.get(stream.client)
            if slot is not None and slot.stream is stream:
                self._end(slot, failure or "the client has left", failure)

    def disconnected(self, stream: ServerStream) -> None:
        """Note that a stream has broken; its client may connect again."""
        with self._changed:
            slot = self._slots.get(stream.client)
            if slot is not None and slot.stream is stream:
                slot.stream = None
                slot.group.batcher.disconnect(stream.client)
                self._changed.notify_all()

    def _slot(self, client: str) -> ClientSlot:
        if client not in self._slots:
            raise FrameError(
                f"split server: there is no client {client!r} in this round; there are "
                f"{sorted(self._slots)[:5]}"
            )
        return self._slots[client]

    def _end(self, slot: ClientSlot, reason: str, failure: str | None) -> None:
        """End a client's work, if it has not ended; the thread tells its server part."""
        if slot.ended is not None:
            return
        slot.ended, slot.failure = reason, failure
        if slot.stream is not None:
            slot.stream.end(reason)
            slot.stream = None
        slot.group.batcher.leave(slot.session.client)
        self._leaving.append(slot)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                task = self._next()
                while task is None and not self._stopped:
                    self._changed.wait(self._soonest())
                    task = self._next()
                if task is None:
                    return
            task()

    def _next(self) -> Callable[[], None] | None:
        """Return the next task of the thread: clients that leave, then calls, then frames."""
        now = self._clock()
        for slot in self._slots.values():
            if slot.ended is None and now > slot.deadline:
                self._end(slot, slot.timeout, slot.timeout)
        if self._leaving:
            left = self._leaving.popleft()
            return lambda: self._tell_left(left)
        if self._calls:
            call = self._calls.popleft()
            return call.execute
        for group in self._groups:
            if group.batcher.wait(now) == 0.0:
                self._groups.remove(group)  # the other groups come first next time
                self._groups.append(group)
                return lambda: self._serve(group)
        return None

    def _soonest(self) -> float | None:
        """Return the seconds until a deadline or a batch is due; None if neither is."""
        now = self._clock()
        waits = [group.batcher.wait(now) for group in self._groups]
        waits += [
            max(0.0, slot.deadline - now) + 0.001
            for slot in self._slots.values()
            if slot.ended is None
        ]
        return min((wait for wait in waits if wait is not None), default=None)

    def _serve(self, group: ServerGroup) -> None:
        with self._changed:
            batch = group.batcher.take()
            streams = {client: self._slots[client].stream for client in group.clients}
        try:
            for client in batch.forgotten:
                group.server.forget(client)
            replies = group.server.answer(batch.frames)
        except Exception as error:
            self._fail(group, error)
            return
        with self._changed:
            group.batcher.set_waiting(group.server.waiting)
        for client, reply in replies:
            stream = streams[client]
            if stream is not None:  # a stream that was replaced meanwhile drops it
                stream.reply(reply)

    def _tell_left(self, slot: ClientSlot) -> None:
        if slot.group.failed:
            return
        try:
            slot.group.server.leave(slot.session.client)
        except Exception as error:
            self._fail(slot.group, error)

    def _fail(self, group: ServerGroup, error: Exception) -> None:
        """End the work of the clients of a server part that has raised."""
        log.error("the server part of %s has failed", ", ".join(group.clients), exc_info=error)
        with self._changed:
            group.failed = True
            for client in group.clients:
                slot = self._slots[client]
                if slot.ended is None:
                    reason = "its server part failed; the server's log says why"
                    self._end(
                        slot, reason, f"its server part failed: {type(error).__name__}: {error}"
                    )
