"""The layout of a frame: what each byte means, and the checks that decide sizes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from polyrank.codecs import Codec, number_formats
from polyrank.errors import FrameError
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    Returned,
    Step,
    Stepped,
)

Message = Request | Reply

MAGIC = b"PRSF"
VERSION = 1
NAME_BYTES = 1024
"""The longest client name, in UTF-8."""
REASON_BYTES = 4096
"""The longest reason of a refusal, in UTF-8; a longer one is cut."""

HEAD = struct.Struct("<4sBBBBIIIIddHHIII")
CHECKSUM = struct.Struct("<I")
LAST, LABELS, LOSS, NORM = 1, 2, 4, 8
KINDS: dict[int, type[Message]] = {
    1: Activations,
    2: Gradients,
    3: Step,
    4: Returned,
    5: Stepped,
    6: Refused,
}
NUMBERS = {kind: number for number, kind in KINDS.items()}
_FLAGS = {Activations: LAST | LABELS, Gradients: LAST, Returned: LOSS | NORM}
WITH_STATES = (Activations, Gradients, Returned)


class Head(NamedTuple):
    """The fixed part of a frame."""

    magic: bytes
    version: int
    kind: int
    flags: int
    format: int
    round: int
    attempt: int
    step: int
    micro: int
    first: float
    second: float
    client: int
    reason: int
    rows: int
    width: int
    sequences: int


@dataclass(frozen=True)
class FrameLimits:
    """What both ends have agreed on: the most tokens of a frame, their width d, and the codec."""

    tokens: int
    width: int
    codec: Codec

    @property
    def nbytes(self) -> int:
        """The length of the longest frame that can be valid."""
        states = max(
            format.nbytes(self.tokens, self.width)
            for format in (self.codec.activations, self.codec.gradients)
        )
        lengths_and_labels = 8 * self.tokens
        fixed = HEAD.size + CHECKSUM.size
        return fixed + NAME_BYTES + max(REASON_BYTES, lengths_and_labels + states)


def read_head(view: memoryview, limits: FrameLimits) -> Head:
    """Check all that decides sizes, and that they add up to the frame's length."""
    least = HEAD.size + CHECKSUM.size
    expect(len(view) >= least, "length", f"at least {least} bytes", len(view))
    expect(len(view) <= limits.nbytes, "length", f"at most {limits.nbytes} bytes", len(view))
    head = Head(*HEAD.unpack_from(view))
    expect(head.magic == MAGIC, "first bytes", MAGIC, head.magic)
    expect(head.version == VERSION, "version", VERSION, head.version)
    expect(head.kind in KINDS, "kind", f"1 to {len(KINDS)}", head.kind)
    kind = KINDS[head.kind]
    expect(head.flags & ~_FLAGS.get(kind, 0) == 0, "flags", f"those of {kind.__name__}", head.flags)
    expect(0 < head.client <= NAME_BYTES, "name", f"1 to {NAME_BYTES} bytes", head.client)
    longest = REASON_BYTES if kind is Refused else 0
    expect(head.reason <= longest, "reason", f"at most {longest} bytes", head.reason)

    states = 0
    if kind in WITH_STATES:
        agreed = {
            Activations: (limits.codec.activations,),
            Gradients: (limits.codec.gradients,),
            Returned: (limits.codec.activations, limits.codec.gradients),
        }[kind]
        names = " or ".join(sorted({format.name for format in agreed}))
        format = number_formats().get(head.format)
        came = f"number {head.format}" if format is None else format.name
        if format is None or format not in agreed:
            raise FrameError(f"frame, format: expected {names}, as agreed; {came} came")
        expect(0 < head.rows <= limits.tokens, "tokens", f"1 to {limits.tokens}", head.rows)
        expect(head.width == limits.width, "width", limits.width, head.width)
        states = format.nbytes(head.rows, head.width)
    else:
        expect(head.format == head.rows == head.width == 0, "states", "none", "some")
    most = head.rows if kind is Activations else 0
    expect(head.sequences <= most, "sequences", f"at most {most}", head.sequences)

    labels = 4 * head.rows if head.flags & LABELS else 0
    total = least + head.client + head.reason + 4 * head.sequences + labels + states
    expect(len(view) == total, "length", f"{total} bytes, by its head", len(view))
    return head


def expect(fits: bool, what: str, expected: object, came: object) -> None:
    """Raise FrameError about a part of the frame, unless it fits."""
    if not fits:
        raise FrameError(f"frame, {what}: expected {expected}; {came} came")
