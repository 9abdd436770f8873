"""Links within one process: nothing leaves it, and yet every message is bytes on the way."""

from __future__ import annotations

from collections import defaultdict, deque

from polyrank.codecs import codec
from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.training.split.link import ServerPart
from polyrank.training.split.messages import Request
from polyrank.transport.layout import FrameLimits
from polyrank.transport.pending import PendingFrame, write_request
from polyrank.transport.serving import FrameServer


class InProcessLinks:
    """Links of many clients to one server part, which answers their requests together.

    Requests wait until a client needs an answer. Then the oldest request of every client goes to
    the server part in one call, again and again until none is left: so several clients train in
    one pass. `codec_name` is the wire, `width` that of the model, `tokens` the most that a
    microbatch holds. Not thread-safe: all links are to be used from one thread.
    """

    def __init__(self, server_part: ServerPart, codec_name: str, width: int, tokens: int) -> None:
        self.limits = FrameLimits(tokens, width, codec(codec_name))
        self._server = FrameServer(server_part, defaultdict(lambda: self.limits))
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
        """Forget a link; the server part discards the client's unfinished work."""
        if self._open.get(link.client) is link:
            del self._open[link.client]
            self._server.leave(link.client)

    def drain(self) -> None:
        """Have all waiting requests answered, the oldest of every client in one call."""
        while frames := {
            client: link.next_frame() for client, link in self._open.items() if link.waiting
        }:
            for client, reply in self._server.answer(frames):
                self._open[client].receive(reply)
        for client, reply in self._server.answer({}):  # a client that has left was waited for
            self._open[client].receive(reply)


class InProcessLink:
    """A client's link to a server part in the same process. Not thread-safe.

    `limits` are those that the client keeps: of `InProcessLinks`, unless the two disagree.
    """

    def __init__(self, links: InProcessLinks, client: str, limits: FrameLimits) -> None:
        self.client, self.limits = client, limits
        self.waiting: deque[bytes] = deque()
        """Frames that no server part has seen yet."""
        self._links = links
        self._unanswered: deque[PendingFrame] = deque()
        self.closed = False
        self._up = self._down = 0
        links.enter(self)

    def submit(self, request: Request) -> PendingFrame:
        """Encode a request and queue it; FrameError if it cannot be sent, or after `close`."""
        if self.closed:
            raise FrameError(f"{request.id}: the link is closed; open a new one")
        frame = write_request(request, self.limits)
        self._up += len(frame)
        pending = PendingFrame(request, self.limits, lambda: self._answer(pending))
        self.waiting.append(frame)
        self._unanswered.append(pending)
        return pending

    @property
    def traffic(self) -> WireBytes:
        """The bytes of all requests that were submitted and all replies that came."""
        return WireBytes(self._up, self._down)

    def next_frame(self) -> bytes:
        """Hand over the oldest request that waits."""
        return self.waiting.popleft()

    def receive(self, frame: bytes) -> None:
        """Take the reply to the oldest request without one."""
        self._down += len(frame)
        self._unanswered.popleft().deliver(frame)

    def close(self) -> None:
        """Close the link: waiting requests are dropped, and unfinished work is discarded."""
        if not self.closed:
            self.closed = True
            self.waiting.clear()
            self._unanswered.clear()
            self._links.leave(self)

    def _answer(self, pending: PendingFrame) -> None:
        """Have all waiting requests answered, this one among them."""
        self._links.drain()
        if pending in self._unanswered or self.closed:
            raise FrameError(
                "the link was closed or the server part failed before the request was answered, "
                "or the request waits for clients that have not asked yet"
            )
