"""Messages of a split step as bytes, and back.

A frame is, little-endian and without gaps:

    magic      4   b"PRSF"
    version    u8  1
    kind       u8  1 Activations, 2 Gradients, 3 Step, 4 Returned, 5 Stepped, 6 Refused
    flags      u8  1 last, 2 labels follow, 4 has a loss, 8 has a squared norm
    format     u8  number format of the states, see `polyrank.codecs`; 0 without states
    round      u32
    attempt    u32
    step       u32
    micro      u32
    first      f64 weight (Activations), factor (Step), loss (Returned); else 0
    second     f64 squared norm (Returned); else 0
    client     u16 bytes of the client's name
    reason     u16 bytes of the reason (Refused); else 0
    rows       u32 P, all tokens
    width      u32 d, numbers of a token
    sequences  u32 rows of the microbatch (Activations); else 0
    then the name and the reason (UTF-8), the lengths (u32 each), the labels (i32 each), the states
    (in their format), and the CRC-32 of all before it (u32)

The checksum finds accidents, not attacks: whoever can write a frame can write its checksum. So
`decode` believes nothing: each size is compared with the limits and with the frame's real length
before anything of that size is made. Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from polyrank.codecs import Codec, NumberFormat, number_formats
from polyrank.errors import FrameError
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Refused,
    Request,
    RequestId,
    Returned,
    Step,
    Stepped,
)
from polyrank.transport.fields import (
    check_count,
    check_lengths,
    check_numbers,
    read_labels,
    read_text,
    shape,
    write_labels,
    write_text,
)
from polyrank.transport.layout import (
    CHECKSUM,
    HEAD,
    KINDS,
    LABELS,
    LAST,
    LOSS,
    MAGIC,
    NAME_BYTES,
    NORM,
    NUMBERS,
    REASON_BYTES,
    VERSION,
    WITH_STATES,
    FrameLimits,
    Head,
    Message,
    expect,
    read_head,
)


def format_of(message: Message, codec: Codec, answers: Request | None = None) -> NumberFormat:
    """Return the number format of a message's states.

    What is returned for the activations of a U-shape are activations again; every other answer is a
    gradient.
    """
    if isinstance(message, Activations):
        return codec.activations
    if isinstance(message, Returned) and isinstance(answers, Activations):
        return codec.activations if answers.labels is None else codec.gradients
    return codec.gradients


def encode(message: Message, codec: Codec, answers: Request | None = None) -> bytes:
    """Return a message as a frame; `answers` is the request that a reply answers.

    Raises FrameError for a message that no frame can hold: numbers that are not finite, negative
    counts, shapes that do not fit together, too long a name.
    """
    at, place = message.id, f"{type(message).__name__} of {message.id}"
    for name in ("round", "attempt", "step", "micro"):
        check_count(getattr(at, name), f"{place}: {name}")
    client = write_text(at.client, NAME_BYTES, f"{place}: the client's name")
    flags, first, second, reason = 0, 0.0, 0.0, b""
    lengths: tuple[int, ...] = ()
    labels: Tensor | None = None
    states: Tensor | None = None
    match message:
        case Activations():
            flags = LAST * message.last | LABELS * (message.labels is not None)
            first, lengths = message.weight, message.lengths
            labels, states = message.labels, message.states
        case Gradients():
            flags, states = LAST * message.last, message.states
        case Step():
            first = message.factor
        case Returned():
            flags = LOSS * (message.loss is not None) | NORM * (message.squared_norm is not None)
            first = 0.0 if message.loss is None else message.loss
            second = 0.0 if message.squared_norm is None else message.squared_norm
            states = message.states
        case Refused():
            whole = message.reason.encode("utf-8", "replace")[:REASON_BYTES]
            reason = whole.decode("utf-8", "ignore").encode()  # no half of a character at the end
    check_numbers(first, second, place)
    rows, width, format, payload = 0, 0, 0, memoryview(b"")
    if states is not None:
        rows, width = shape(states, place)
        numbers = format_of(message, codec, answers)
        format, payload = numbers.number, numbers.encode(states, place)
    if isinstance(message, Activations):
        check_lengths(lengths, rows, place)
    head = HEAD.pack(
        MAGIC,
        VERSION,
        NUMBERS[type(message)],
        flags,
        format,
        at.round,
        at.attempt,
        at.step,
        at.micro,
        first,
        second,
        len(client),
        len(reason),
        rows,
        width,
        len(lengths),
    )
    written = memoryview(b"") if labels is None else write_labels(labels, rows, place)
    parts = (head, client, reason, struct.pack(f"<{len(lengths)}I", *lengths), written, payload)
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((*parts, CHECKSUM.pack(checksum)))


def decode(frame: bytes | bytearray | memoryview, limits: FrameLimits) -> Message:
    """Return the message of a frame.

    Raises FrameError for everything that `encode` would not have written under these limits; the
    place is that in the frame, for its client cannot be believed yet.
    """
    view = memoryview(frame).cast("B")
    head = read_head(view, limits)
    kind = KINDS[head.kind]
    (checksum,) = CHECKSUM.unpack(view[-CHECKSUM.size :])
    came = zlib.crc32(view[: -CHECKSUM.size])
    expect(came == checksum, "checksum", f"{checksum:#010x}", f"{came:#010x}")

    start = HEAD.size
    client = read_text(view[start : start + head.client], "name of the client")
    start += head.client
    reason = read_text(view[start : start + head.reason], "reason")
    start += head.reason
    at = RequestId(client, head.round, head.attempt, head.step, head.micro)
    place = f"{kind.__name__} of {at}"
    check_numbers(head.first, head.second, place)
    _unused(head, kind, place)

    lengths = struct.unpack_from(f"<{head.sequences}I", view, start)
    start += 4 * head.sequences
    labels = None
    if kind is Activations:
        check_lengths(lengths, head.rows, place)
        if head.flags & LABELS:
            labels = read_labels(view[start : start + 4 * head.rows], head.rows, place)
            start += 4 * head.rows
    states = torch.empty(0, 0)
    if kind in WITH_STATES:
        payload = view[start : -CHECKSUM.size]
        states = number_formats()[head.format].decode(payload, head.rows, head.width, place)

    last = bool(head.flags & LAST)
    message: Message
    if kind is Activations:
        message = Activations(at, last, head.first, lengths, states, labels)
    elif kind is Gradients:
        message = Gradients(at, last, states)
    elif kind is Step:
        message = Step(at, head.first)
    elif kind is Returned:
        loss = head.first if head.flags & LOSS else None
        message = Returned(at, states, loss, head.second if head.flags & NORM else None)
    elif kind is Stepped:
        message = Stepped(at)
    else:
        message = Refused(at, reason)
    return message


def _unused(head: Head, kind: type[Message], place: str) -> None:
    """Refuse numbers, −0 too, where the kind has none: each message has one frame only."""
    first = kind in (Activations, Step) or bool(head.flags & LOSS)
    second = bool(head.flags & NORM)
    zero = (0.0).hex()
    if (head.first.hex() != zero and not first) or (head.second.hex() != zero and not second):
        raise FrameError(f"{place}: expected no numbers that this kind lacks; some came")
