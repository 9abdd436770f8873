"""A request as a link sends it, and the reply that the client waits for."""

from __future__ import annotations

from collections.abc import Callable

from polyrank.errors import FrameError
from polyrank.training.split.messages import Refused, Reply, Request, Returned, Step, Stepped
from polyrank.transport.frames import decode, encode
from polyrank.transport.layout import FrameLimits


def write_request(request: Request, limits: FrameLimits) -> bytes:
    """Return a request as a frame; FrameError if it is longer than any valid one."""
    frame = encode(request, limits.codec)
    if len(frame) > limits.nbytes:
        raise FrameError(
            f"{request.id}: expected a frame of at most {limits.nbytes} bytes, as {limits.tokens} "
            f"tokens take; this one has {len(frame)}: send fewer tokens at a time"
        )
    return frame


class PendingFrame:
    """The reply to a request that a link has sent: a `PendingReply`.

    The link calls `deliver` with the reply's frame. `result` calls `wait` until it has: `wait`
    returns when some reply was delivered, and raises FrameError if this one will never be.
    """

    def __init__(self, request: Request, limits: FrameLimits, wait: Callable[[], None]) -> None:
        self._at = request.id
        self._rows = None if isinstance(request, Step) else len(request.states)
        self._limits, self._wait = limits, wait
        self._frame: bytes | None = None
        self._reply: Returned | Stepped | None = None

    def deliver(self, frame: bytes) -> None:
        """Keep the reply's frame until `result` is called."""
        self._frame = frame

    def result(self) -> Returned | Stepped:
        """Wait for the reply and return it.

        Raises FrameError if none will come, it is malformed or of another request, or the server
        refused the request.
        """
        if self._reply is None:
            while self._frame is None:
                try:
                    self._wait()
                except FrameError as error:
                    raise FrameError(f"{self._at}: no answer came: {error}") from error
            self._reply = self._read(self._frame)
            self._frame = b""
        return self._reply

    def _read(self, frame: bytes) -> Returned | Stepped:
        at = self._at
        try:
            reply: Reply | Request = decode(frame, self._limits)
        except FrameError as error:
            raise FrameError(f"the answer to {at}: {error}") from error
        if isinstance(reply, Refused):
            raise FrameError(f"{at}: the server refused: {reply.reason}")
        if reply.id != at:
            raise FrameError(f"expected the answer to {at}; that to {reply.id} came")
        if self._rows is None:
            if not isinstance(reply, Stepped):
                raise FrameError(f"{at}: expected Stepped; {type(reply).__name__} came")
            return reply
        if not isinstance(reply, Returned):
            raise FrameError(f"{at}: expected Returned; {type(reply).__name__} came")
        if len(reply.states) != self._rows:
            raise FrameError(f"{at}: expected {self._rows} tokens back; {len(reply.states)} came")
        return reply
