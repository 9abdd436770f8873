"""Frames: what is written is read back, and nothing else is ever read."""

import random
import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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

D = 3
TOKENS = 6
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
U32 = st.integers(0, 2**32 - 1)
ATS = st.builds(RequestId, st.text(min_size=1, max_size=40), U32, U32, U32, U32)
LENGTHS = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
TOKEN = st.one_of(st.just(-100), st.integers(0, 2**31 - 1))
NORM = st.one_of(st.none(), st.floats(0, allow_nan=False, allow_infinity=False))


@st.composite
def states(draw, rows):
    numbers = draw(st.lists(FLOAT32, min_size=rows * D, max_size=rows * D))
    return torch.tensor(numbers, dtype=torch.float32).reshape(rows, D)


@st.composite
def activations(draw):
    lengths = draw(LENGTHS)
    rows = sum(lengths)
    labels = draw(st.one_of(st.none(), st.lists(TOKEN, min_size=rows, max_size=rows)))
    labels = None if labels is None else torch.tensor(labels)
    at, last, weight = draw(ATS), draw(st.booleans()), draw(FINITE)
    return Activations(at, last, weight, lengths, draw(states(rows)), labels)


@st.composite
def gradients(draw):
    return Gradients(draw(ATS), draw(st.booleans()), draw(states(draw(st.integers(1, TOKENS)))))


@st.composite
def returned(draw):
    what = draw(states(draw(st.integers(1, TOKENS))))
    return Returned(draw(ATS), what, draw(st.one_of(st.none(), FINITE)), draw(NORM))


MESSAGES = st.one_of(
    activations(),
    gradients(),
    returned(),
    st.builds(Step, ATS, FINITE),
    st.builds(Stepped, ATS),
    st.builds(Refused, ATS, st.text(max_size=100)),
)


def parts(message):
    """All that a message says, comparable: tensors by shape, type and numbers (NaN apart)."""
    return {
        name: (value.shape, value.dtype, value.tolist()) if torch.is_tensor(value) else value
        for name, value in message.__dict__.items()
    }


@given(MESSAGES)
def test_reading_undoes_writing(message):
    read = decode(encode(message, codec("float32")), FrameLimits(TOKENS, D, codec("float32")))
    assert type(read) is type(message)
    assert parts(read) == parts(message)


@given(MESSAGES)
def test_reading_undoes_writing_in_float64(message):
    if isinstance(message, Activations | Gradients | Returned):
        fields = {**message.__dict__, "states": message.states.double() / 3}
        message = type(message)(**fields)
    read = decode(encode(message, codec("float64")), FrameLimits(TOKENS, D, codec("float64")))
    assert type(read) is type(message)
    assert parts(read) == parts(message)


def examples():
    torch.manual_seed(0)
    at, here = RequestId("client 1", 1, 0, 2, 3), torch.randn(5, D)
    return [
        Activations(at, True, 0.1, (2, 3), here, torch.tensor([1, -100, 2, 3, 4])),
        Activations(at, False, 0.1, (5,), here, None),
        Gradients(at, True, here),
        Step(at, 0.5),
        Returned(at, here, 2.0, 3.0),
        Stepped(at),
        Refused(at, "why not"),
    ]


def mutated(frame, dice):
    """The frame with an accident, or with what someone has changed on purpose."""
    body = bytearray(frame)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        spot = dice.randrange(len(body)) if body else 0
        match dice.randrange(7):
            case 0 if body:
                body[spot] ^= 1 << dice.randrange(8)
            case 1 if body:
                body[spot] = dice.choice((0, 1, 127, 128, 255))
            case 2:
                del body[spot:]
            case 3:
                body += dice.randbytes(dice.choice((1, 4, 12, 100)))
            case 4:
                body[spot:spot] = dice.randbytes(dice.choice((1, 4)))
            case 5:
                del body[spot : spot + dice.choice((1, 4, 12))]
            case 6 if len(body) > 60:  # a number in the head, where sizes are
                struct.pack_into("<I", body, dice.randrange(4, 53), dice.choice((0, 1, 6, 2**31)))
    return bytes(body)


@pytest.mark.parametrize("wire", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("checksum", ["left", "made again"])
def test_of_damaged_frames_nothing_but_frame_errors_and_valid_messages_come(wire, checksum):
    dice = random.Random(f"{wire} {checksum}")
    limits = FrameLimits(TOKENS, D, codec(wire))
    frames = [encode(message, limits.codec) for message in examples()]
    read = refused = 0
    for _ in range(3000):
        damaged = mutated(dice.choice(frames), dice)
        if checksum == "made again":
            damaged = damaged[:-4] + struct.pack("<I", zlib.crc32(damaged[:-4]))
        try:
            message = decode(damaged, limits)
        except FrameError:
            refused += 1
            continue
        read += 1
        if checksum == "left":  # no accident goes unseen
            assert damaged in frames
        if wire != "int8":  # a message has one frame only; int8 may choose another scale
            assert encode(message, limits.codec) == damaged
        if isinstance(message, Activations | Gradients | Returned):
            assert torch.isfinite(message.states).all()
            assert message.states.shape[0] <= TOKENS
    assert refused > 1000
    assert read > (0 if checksum == "left" else 100)


def test_random_bytes_are_refused():
    dice = random.Random(0)
    limits = FrameLimits(TOKENS, D, codec("bf16"))
    for length in range(300):
        with pytest.raises(FrameError):
            decode(dice.randbytes(length), limits)
