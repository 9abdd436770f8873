"""A client's request as it is sent, and what is expected for it."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.errors import FrameError
from polyrank.training.split.messages import At, Refused, Request, Returned, Step, Stepped
from polyrank.transport.frames import decode, encode
from polyrank.transport.layout import Limits


def write_request(request: Request, limits: Limits) -> bytes:
    """Return a request as a frame; FrameError if it is longer than any valid one."""
    frame = encode(request, limits.codec)
    if len(frame) > limits.nbytes:
        raise FrameError(
            f"{request.at}: expected a frame of at most {limits.nbytes} bytes, as {limits.tokens} "
            f"tokens take; this one has {len(frame)}: send fewer tokens at a time"
        )
    return frame


@dataclass(frozen=True)
class Awaited:
    """The reply that fits a request: `rows` tokens come back, or `None` for a step."""

    at: At
    rows: int | None

    @classmethod
    def of(cls, request: Request) -> Awaited:
        """Return what is to be expected for a request."""
        return cls(request.at, None if isinstance(request, Step) else len(request.states))

    def read(self, frame: bytes, limits: Limits) -> Returned | Stepped:
        """Return the reply that a frame holds.

        Raises FrameError if it is malformed or does not fit, and with the server's reason if the
        request was refused.
        """
        try:
            reply = decode(frame, limits)
        except FrameError as error:
            raise FrameError(f"the answer to {self.at}: {error}") from error
        if isinstance(reply, Refused):
            raise FrameError(f"{self.at}: the server refused: {reply.reason}")
        if reply.at != self.at:
            raise FrameError(f"expected the answer to {self.at}; that to {reply.at} came")
        if self.rows is None:
            if not isinstance(reply, Stepped):
                raise FrameError(f"{self.at}: expected Stepped; {type(reply).__name__} came")
            return reply
        if not isinstance(reply, Returned):
            raise FrameError(f"{self.at}: expected Returned; {type(reply).__name__} came")
        if len(reply.states) != self.rows:
            raise FrameError(
                f"{self.at}: expected {self.rows} tokens back; {len(reply.states)} came"
            )
        return reply
