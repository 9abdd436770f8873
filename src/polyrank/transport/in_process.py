"""Links within one process: nothing leaves it, and yet every message is bytes on the way."""

from __future__ import annotations

from collections import deque

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart, Traffic
from polyrank.training.split.messages import Request, Returned, Stepped
from polyrank.transport.awaited import Awaited, write_request
from polyrank.transport.codec import codec
from polyrank.transport.layout import Limits
from polyrank.transport.serving import Serving


class InProcessLinks:
    """Links of many clients to one tail, whose requests it answers together.

    Requests wait until someone needs an answer. Then the oldest request of every client goes to the
    tail in one call, again and again until none is left: so the tails of several clients train in
    one pass. `codec_name` is the wire, `width` that of the model, `tokens` the most that a
    microbatch holds. Not thread-safe: all links are to be used from one thread.
    """

    def __init__(self, tail: ServerPart, codec_name: str, width: int, tokens: int) -> None:
        self.limits = Limits(tokens, width, codec(codec_name))
        self._serving = Serving(tail, self.limits)
        self._open: dict[str, InProcessLink] = {}

    def link(self, client: str) -> InProcessLink:
        """Open a client's link; FrameError if it has one that is not closed."""
        return InProcessLink(self, client, self.limits)

    def enter(self, link: InProcessLink) -> None:
        """Register a link under its client."""
        if link.client in self._open:
            raise FrameError(
                f"client {link.client!r}: expected no open link; one is open; close it first"
            )
        self._open[link.client] = link

    def leave(self, link: InProcessLink) -> None:
        """Forget a link; the tail of unfinished work is discarded."""
        if self._open.get(link.client) is link:
            del self._open[link.client]
            self._serving.leave(link.client)

    def drain(self) -> None:
        """Have all requests answered that wait, the oldest of every client in one call."""
        while True:
            frames = {
                client: link.hand_over() for client, link in self._open.items() if link.waiting
            }
            for client, reply in self._serving.answer(frames):
                self._open[client].handed_over.popleft().deliver(reply)
            if not frames:
                return


class InProcessLink:
    """A client's link to a tail in the same process. Not thread-safe; see `InProcessLinks`.

    `limits` are what the client holds to: those of `InProcessLinks`, unless the two disagree.
    """

    def __init__(self, links: InProcessLinks, client: str, limits: Limits) -> None:
        self.client = client
        self.limits = limits
        self.links = links
        self.waiting: deque[Ticket] = deque()
        self.handed_over: deque[Ticket] = deque()
        self.closed = False
        self._up = 0
        self._down = 0
        links.enter(self)

    def submit(self, request: Request) -> Ticket:
        """Encode a request and queue it; FrameError if it cannot be sent, or after `close`."""
        if self.closed:
            raise FrameError(f"{request.at}: the link is closed; open a new one")
        frame = write_request(request, self.limits)
        self._up += len(frame)
        ticket = Ticket(self, Awaited.of(request), frame)
        self.waiting.append(ticket)
        return ticket

    @property
    def traffic(self) -> Traffic:
        """The bytes of all requests that were submitted and all replies that came."""
        return Traffic(self._up, self._down)

    def hand_over(self) -> bytes:
        """Return the oldest request that waits, whose answer is then awaited."""
        self.handed_over.append(self.waiting.popleft())
        return self.handed_over[-1].take()

    def received(self, count: int) -> None:
        """Count the bytes of a reply."""
        self._down += count

    def close(self) -> None:
        """Give the link up: what waits is dropped, and the tail of unfinished work discarded."""
        if not self.closed:
            self.closed = True
            self.waiting.clear()
            self.handed_over.clear()
            self.links.leave(self)


class Ticket:
    """An answer that is on its way through an `InProcessLink`."""

    def __init__(self, link: InProcessLink, awaited: Awaited, request: bytes) -> None:
        self._link = link
        self._awaited = awaited
        self._request = request
        self._reply: bytes | None = None
        self._answer: Returned | Stepped | None = None

    def take(self) -> bytes:
        """Hand the request over; it is not kept."""
        request, self._request = self._request, b""
        return request

    def deliver(self, reply: bytes) -> None:
        """Keep the reply until it is asked for."""
        self._link.received(len(reply))
        self._reply = reply

    def result(self) -> Returned | Stepped:
        """Return the answer, having all waiting requests answered if need be."""
        if self._answer is None:
            if self._reply is None:
                self._link.links.drain()
            if self._reply is None:
                raise FrameError(
                    f"{self._awaited.at}: no answer came: the link was closed or the tail failed "
                    "before it was answered, or it waits for clients that have not asked yet"
                )
            self._answer = self._awaited.read(self._reply, self._link.limits)
            self._reply = b""
        return self._answer
