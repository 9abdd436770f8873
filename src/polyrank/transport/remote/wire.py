"""Names, bounds and messages that both ends of a gRPC stream share; frames cut into parts."""

from __future__ import annotations

from collections.abc import Iterator

from polyrank.errors import FrameError
from polyrank.transport.remote import split_pb2 as pb

VERSION = 1
PART_BYTES = 2**18
"""The most bytes of a frame in one message: small enough that progress shows on a slow line."""
MESSAGE_BYTES = PART_BYTES + 1024
"""The most bytes of a message; gRPC ends a stream that brings a longer one."""
HELLO_SECONDS = 5.0
REASON_BYTES = 4096
SERVICE = pb.DESCRIPTOR.services_by_name["Split"].full_name
METHOD = f"/{SERVICE}/Train"


def new_hello(run: str, round: int, attempt: int, client: str) -> pb.Hello:
    """Return a Hello with the client's session, without token or proof."""
    return pb.Hello(version=VERSION, run=run, round=round, attempt=attempt, client=client)


def frame_parts(frame: bytes) -> Iterator[pb.Part]:
    """Return the parts of a frame in order, the last one marked."""
    view = memoryview(frame)
    for start in range(0, max(1, len(frame)), PART_BYTES):
        stop = start + PART_BYTES
        yield pb.Part(data=bytes(view[start:stop]), last=stop >= len(frame))


class FrameAssembler:
    """Puts the parts of frames together; no frame is longer than `longest` bytes."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._received = bytearray()

    def add(self, part: pb.Part) -> bytes | None:
        """Return the frame that this part completes, or None; FrameError beyond the bounds."""
        least = 1 if part.last else PART_BYTES  # a frame is few messages
        if not least <= len(part.data) <= PART_BYTES:
            raise FrameError(
                f"a part of a frame: expected {least} to {PART_BYTES} bytes; {len(part.data)} came"
            )
        if len(self._received) + len(part.data) > self._longest:
            raise FrameError(f"frame, length: expected at most {self._longest} bytes; more came")
        if part.last and not self._received:
            return part.data
        self._received += part.data
        if not part.last:
            return None
        frame, self._received = bytes(self._received), bytearray()
        return frame


def truncated(reason: str) -> str:
    """Return a reason cut to at most `REASON_BYTES` of UTF-8."""
    return reason.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore")
