"""A frame is read whole or refused, with what was expected and what came."""

import math
import struct
import zlib
from dataclasses import replace

import pytest
import torch

from polyrank.codecs import codec
from polyrank.errors import FrameError
from polyrank.training.split import (
    Activations,
    Gradients,
    Refused,
    RequestId,
    Returned,
    Step,
    Stepped,
)
from polyrank.transport import FrameLimits, decode, encode
from polyrank.transport.layout import HEAD, NAME_BYTES, REASON_BYTES

D = 4
WIRE = codec("float32")
LIMITS = FrameLimits(8, D, WIRE)
AT = RequestId("Zoë/7", 3, 1, 5, 2)
STATES = torch.arange(5 * D).reshape(5, D).float()
LABELS = torch.tensor([7, -100, 0, 31999, 2**31 - 1])
SENT = Activations(AT, True, 0.25, (2, 3), STATES, LABELS)
EXAMPLES = {
    "activations": SENT,
    "activations of a U-shape": replace(SENT, labels=None, last=False),
    "gradients": Gradients(AT, True, STATES),
    "step": Step(AT, 0.5),
    "returned": Returned(AT, STATES, 0.0, 1.5),
    "returned in a U-shape": Returned(AT, STATES),
    "stepped": Stepped(AT),
    "refused": Refused(AT, "no such step; bitte später"),
}
FIELDS = {  # where a head's fields begin, and how they are written; as documented
    "magic": (0, "4s"),
    "version": (4, "B"),
    "kind": (5, "B"),
    "flags": (6, "B"),
    "format": (7, "B"),
    "round": (8, "I"),
    "first": (24, "d"),
    "second": (32, "d"),
    "client": (40, "H"),
    "reason": (42, "H"),
    "rows": (44, "I"),
    "width": (48, "I"),
    "sequences": (52, "I"),
}


def signed(body):
    """A frame with the right checksum."""
    return bytes(body) + struct.pack("<I", zlib.crc32(body))


def changed(frame, field, value):
    """The frame with another value in its head, and the checksum that belongs to it."""
    start, how = FIELDS[field]
    body = bytearray(frame[:-4])
    struct.pack_into("<" + how, body, start, value)
    return signed(body)


def same(one, other):
    """Whether two messages are equal; labels may be of any type of whole numbers."""
    if type(one) is not type(other) or one.__dict__.keys() != other.__dict__.keys():
        return False
    for name, value in one.__dict__.items():
        counterpart = getattr(other, name)
        if isinstance(value, torch.Tensor) and isinstance(counterpart, torch.Tensor):
            if not torch.equal(value, counterpart):
                return False
        elif value is not counterpart and value != counterpart:
            return False
    return True


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=EXAMPLES)
def test_every_message_survives(message):
    returned = decode(encode(message, WIRE), LIMITS)
    assert same(returned, message)


def test_a_loss_of_zero_is_not_the_lack_of_one():
    assert decode(encode(Returned(AT, STATES, 0.0, 0.0), WIRE), LIMITS).loss == 0.0
    assert decode(encode(Returned(AT, STATES), WIRE), LIMITS).squared_norm is None


def test_labels_come_back_as_int64():
    assert decode(encode(SENT, WIRE), LIMITS).labels.dtype == torch.int64


def test_the_length_of_a_frame_is_what_its_parts_add_up_to():
    name = len(AT.client.encode())
    assert HEAD.size == 56
    assert len(encode(Stepped(AT), WIRE)) == 56 + name + 4
    assert len(encode(SENT, WIRE)) == 56 + name + 4 * 2 + 4 * 5 + 4 * 5 * D + 4


def test_the_longest_frames_are_inside_the_limit():
    for wire in ("float64", "float32", "bf16", "int8"):
        limits = FrameLimits(8, D, codec(wire))
        name = RequestId("x" * NAME_BYTES, 0, 0, 0)
        longest = Activations(name, True, 1.0, (1,) * 8, torch.zeros(8, D), torch.zeros(8).long())
        for message in (longest, Refused(name, "x" * REASON_BYTES), Returned(name, longest.states)):
            frame = encode(message, limits.codec)
            assert len(frame) <= limits.nbytes
            decode(frame, limits)


@pytest.mark.parametrize("of", [bytes, bytearray, memoryview])
def test_any_bytes_can_be_read(of):
    assert same(decode(of(encode(SENT, WIRE)), LIMITS), SENT)


def test_in_a_u_shape_int8_goes_both_ways_where_activations_go():
    wire = codec("int8")
    up = encode(EXAMPLES["activations of a U-shape"], wire)
    to_u = encode(Returned(AT, STATES), wire, EXAMPLES["activations of a U-shape"])
    to_whole = encode(Returned(AT, STATES), wire, SENT)
    to_gradients = encode(Returned(AT, STATES), wire, EXAMPLES["gradients"])
    assert [frame[7] for frame in (up, to_u, to_whole, to_gradients)] == [4, 4, 3, 3]
    limits = FrameLimits(8, D, wire)
    for frame in (up, to_u, to_whole, to_gradients):
        decode(frame, limits)


REFUSED = {
    "too short": (b"PRSF", "at least 60 bytes; 4 came"),
    "another magic": (changed(encode(SENT, WIRE), "magic", b"HTTP"), "first bytes"),
    "another version": (changed(encode(SENT, WIRE), "version", 2), "version: expected 1; 2 came"),
    "an unknown kind": (changed(encode(SENT, WIRE), "kind", 7), "kind: expected 1 to 6; 7 came"),
    "a kind of zero": (changed(encode(SENT, WIRE), "kind", 0), "kind"),
    "an unknown flag": (changed(encode(SENT, WIRE), "flags", 16), "flags"),
    "flags of another kind": (changed(encode(Stepped(AT), WIRE), "flags", 1), "flags"),
    "a loss in a request": (changed(encode(SENT, WIRE), "flags", 5), "flags"),
    "an unknown format": (changed(encode(SENT, WIRE), "format", 9), "float32, as agreed; number 9"),
    "no name": (changed(encode(SENT, WIRE), "client", 0), "name"),
    "too long a name": (changed(encode(SENT, WIRE), "client", 65535), "name"),
    "a reason in a request": (changed(encode(SENT, WIRE), "reason", 1), "reason"),
    "no tokens": (changed(encode(SENT, WIRE), "rows", 0), "tokens: expected 1 to 8; 0 came"),
    "too many tokens": (changed(encode(SENT, WIRE), "rows", 2**32 - 1), "1 to 8; 4294967295 came"),
    "another width": (changed(encode(SENT, WIRE), "width", 5), "width: expected 4; 5 came"),
    "too many rows": (changed(encode(SENT, WIRE), "sequences", 2**31), "sequences"),
    "rows of gradients": (
        changed(encode(EXAMPLES["gradients"], WIRE), "sequences", 1),
        "sequences",
    ),
    "fewer tokens than bytes": (changed(encode(SENT, WIRE), "rows", 4), "bytes, by its head"),
    "states of a step": (changed(encode(Stepped(AT), WIRE), "rows", 1), "states"),
    "a factor that is NaN": (changed(encode(Step(AT, 1.0), WIRE), "first", math.nan), "finite"),
    "an infinite loss": (changed(encode(SENT, WIRE), "first", math.inf), "finite"),
    "a negative norm": (
        changed(encode(EXAMPLES["returned"], WIRE), "second", -1.0),
        "squared norm of 0 or more",
    ),
    "a number without a meaning": (
        changed(encode(Stepped(AT), WIRE), "first", -0.0),
        "numbers that this kind lacks",
    ),
    "bytes after the end": (signed(encode(SENT, WIRE)[:-4] + b"\x00"), "by its head"),
    "a name that is no UTF-8": (
        signed(encode(SENT, WIRE)[:56] + b"\xff" + encode(SENT, WIRE)[57:-4]),
        "UTF-8",
    ),
    "a label below zero": (
        signed(encode(SENT, WIRE)[:-4].replace(struct.pack("<i", -100), struct.pack("<i", -101))),
        "-101 came",
    ),
    "lengths that do not add up": (
        signed(encode(SENT, WIRE)[:-4].replace(struct.pack("<II", 2, 3), struct.pack("<II", 2, 2))),
        "add up to 5 tokens",
    ),
    "an empty row": (
        signed(encode(SENT, WIRE)[:-4].replace(struct.pack("<II", 2, 3), struct.pack("<II", 0, 5))),
        "lengths of 1 or more",
    ),
    "a flipped bit": (bytes([*encode(SENT, WIRE)[:-9], 1, *encode(SENT, WIRE)[-8:]]), "checksum"),
}


@pytest.mark.parametrize(("frame", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_frame_is_refused(frame, reason):
    with pytest.raises(FrameError, match=reason):
        decode(frame, LIMITS)


@pytest.mark.parametrize("wire", ["float64", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["activations", "gradients", "returned"])
def test_another_wire_than_the_agreed_one_is_refused(kind, wire):
    with pytest.raises(FrameError, match=r"expected float32, as agreed; (float64|bf16|int8) came"):
        decode(encode(EXAMPLES[kind], codec(wire)), LIMITS)


def test_gradients_as_int8_are_refused():
    limits = FrameLimits(8, D, codec("int8"))
    frame = changed(encode(EXAMPLES["gradients"], limits.codec), "format", 4)
    with pytest.raises(FrameError, match="expected bf16, as agreed; int8 came"):
        decode(frame, limits)


def test_one_token_more_than_agreed_is_refused():
    frame = encode(SENT, WIRE)
    decode(frame, FrameLimits(5, D, WIRE))
    with pytest.raises(FrameError, match=r"expected (at most .* bytes|1 to 4)"):
        decode(frame, FrameLimits(4, D, WIRE))


WRONG = {
    "a negative step": replace(SENT, id=RequestId("a", 0, 0, -1)),
    "too large a round": replace(SENT, id=RequestId("a", 2**32, 0, 0)),
    "no name": replace(SENT, id=RequestId("", 0, 0, 0)),
    "too long a name": replace(SENT, id=RequestId("ä" * NAME_BYTES, 0, 0, 0)),
    "a name that UTF-8 cannot hold": replace(SENT, id=RequestId("\ud800", 0, 0, 0)),
    "a weight that is NaN": replace(SENT, weight=math.nan),
    "an infinite factor": Step(AT, math.inf),
    "a negative norm": Returned(AT, STATES, 1.0, -1.0),
    "states of one dimension": replace(SENT, states=STATES[:, 0]),
    "states that are whole numbers": replace(SENT, states=STATES.long()),
    "no tokens": Gradients(AT, True, STATES[:0]),
    "states that are NaN": Gradients(AT, True, STATES * math.nan),
    "lengths that do not add up": replace(SENT, lengths=(2, 2)),
    "an empty row": replace(SENT, lengths=(5, 0)),
    "a negative length": replace(SENT, lengths=(6, -1)),
    "too few labels": replace(SENT, labels=LABELS[:4]),
    "labels that are no whole numbers": replace(SENT, labels=LABELS.float()),
    "a negative label": replace(SENT, labels=-LABELS),
    "too large a label": replace(SENT, labels=LABELS + 2**31),
}


@pytest.mark.parametrize("message", WRONG.values(), ids=WRONG)
def test_a_message_that_no_frame_can_hold_is_refused_by_the_sender(message):
    with pytest.raises(FrameError, match=r"expected .* came"):
        encode(message, WIRE)


def test_a_long_reason_is_cut_between_characters():
    reason = "a" + "ä" * REASON_BYTES
    returned = decode(encode(Refused(AT, reason), WIRE), LIMITS)
    assert reason.startswith(returned.reason)
    assert REASON_BYTES - 1 <= len(returned.reason.encode()) <= REASON_BYTES
