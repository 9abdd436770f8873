"""What every codec must give: exact sizes, a stated bound, and no number that is not finite.

A new codec needs a row in `ROWS` for each number format that it brings.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.codecs import CODECS, codec, number_formats
from polyrank.errors import FrameError

FORMATS = {one.name: one for one in number_formats().values()}


@dataclass(frozen=True)
class Row:
    """What the suite must know of a number format.

    `exact`: whether it keeps float32. `wide`: whether it writes 3.5e38, which float32 cannot hold.
    `largest`: a number near the largest that it writes. `not_finite`: bytes that, written over the
    first ones of a matrix, are no finite number.
    """

    exact: bool
    not_finite: bytes
    wide: bool = False
    largest: float = 1e38


ROWS = {
    "float64": Row(exact=True, not_finite=b"\xff" * 8, wide=True),
    "float32": Row(exact=True, not_finite=b"\xff" * 4),
    "bf16": Row(exact=False, not_finite=b"\xff" * 2),
    "int8": Row(exact=False, not_finite=b"\x00\x00\xc0\x7f"),  # the first scale is NaN
}


def formats(*, exact: bool | None = None):
    names = [name for name, row in ROWS.items() if exact is None or row.exact is exact]
    return pytest.mark.parametrize("numbers", [FORMATS[name] for name in names], ids=names)


def there_and_back(numbers, states):
    rows, width = states.shape
    return numbers.decode(numbers.encode(states, "here"), rows, width, "here")


def matrices(entries, rows=4, width=5):
    return st.lists(
        st.lists(entries, min_size=width, max_size=width), min_size=1, max_size=rows
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def test_every_number_format_has_a_row_and_a_number_of_its_own():
    assert ROWS.keys() == FORMATS.keys()
    used = {id(each): each for n in CODECS for each in (codec(n).activations, codec(n).gradients)}
    assert len({each.number for each in used.values()}) == len(FORMATS) == len(used)
    assert all(1 <= number <= 255 for number in number_formats())


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_found_under_its_name(name):
    assert codec(name).name == name
    assert codec(name) is codec(name)


def test_an_unknown_wire_is_refused_with_the_known_ones():
    with pytest.raises(FrameError, match=f"{', '.join(CODECS)}; 'fp4' came"):
        codec("fp4")


@formats()
def test_the_length_is_exact(numbers):
    for rows, width in ((1, 1), (3, 7), (5, 16)):
        assert len(numbers.encode(torch.randn(rows, width), "here")) == numbers.nbytes(rows, width)


@formats()
@given(states=matrices(st.floats(-1, 1)))
def test_what_is_lost_stays_inside_the_bound_next_to_zero_too(numbers, states):
    for size in (ROWS[numbers.name].largest, 1.0, 1e-37):
        sent = states * size
        returned = there_and_back(numbers, sent).double()
        assert ((returned - sent).abs() <= numbers.bound(sent)).all()


@formats(exact=True)
@given(states=matrices(st.floats(allow_nan=False, allow_infinity=False, width=32)))
def test_an_exact_format_keeps_float32(numbers, states):
    returned = there_and_back(numbers, states.float())
    assert torch.equal(returned, states.to(returned.dtype))


@formats(exact=False)
def test_a_lossy_format_differs_and_its_bound_is_nearly_reached(numbers):
    """A bound that no error comes near to would prove nothing."""
    states = torch.randn(64, 512)
    returned = there_and_back(numbers, states)
    assert returned.dtype == torch.float32
    assert (returned != states).float().mean() > 0.5
    lost = (returned.double() - states.double()).abs()
    assert (lost / numbers.bound(states)).max() > 0.9


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@formats()
def test_what_is_not_finite_is_refused_by_the_sender(numbers, wrong):
    states = torch.randn(3, 4)
    states[1, 2] = wrong
    with pytest.raises(FrameError, match="the sender: expected numbers that are finite"):
        numbers.encode(states, "the sender")


@formats()
def test_what_becomes_infinite_on_the_wire_is_refused(numbers):
    states = torch.tensor([[1.0, 3.5e38]], dtype=torch.float64)
    if ROWS[numbers.name].wide:
        assert torch.equal(there_and_back(numbers, states), states)
    else:
        with pytest.raises(FrameError, match="too large"):
            numbers.encode(states, "here")


@formats()
def test_what_is_not_finite_is_refused_by_the_receiver(numbers):
    payload, wrong = bytearray(numbers.encode(torch.randn(2, 4), "")), ROWS[numbers.name].not_finite
    payload[: len(wrong)] = wrong
    with pytest.raises(FrameError, match="the receiver"):
        numbers.decode(memoryview(payload), 2, 4, "the receiver")


@formats()
def test_a_payload_of_another_length_is_refused(numbers):
    payload = numbers.encode(torch.randn(2, 4), "here")
    for wrong in (payload[:-1], bytes(payload) + b"\x00", b""):
        with pytest.raises(FrameError, match="bytes of states"):
            numbers.decode(memoryview(wrong), 2, 4, "here")


@formats()
def test_any_layout_and_a_graph_are_taken(numbers):
    across = torch.randn(6, 4, requires_grad=True).t() * 1.0
    assert across.requires_grad
    assert not across.is_contiguous()
    expected = there_and_back(numbers, across.detach().contiguous())
    assert torch.equal(there_and_back(numbers, across), expected)


@formats()
def test_half_precision_states_are_taken(numbers):
    states = torch.randn(3, 8).bfloat16()
    returned = there_and_back(numbers, states).double()
    assert ((returned - states.double()).abs() <= numbers.bound(states)).all()


@formats()
def test_what_is_received_shares_no_memory_with_the_frame(numbers):
    payload = bytearray(numbers.encode(torch.randn(2, 4), "here"))
    returned = numbers.decode(memoryview(payload), 2, 4, "here")
    before = returned.clone()
    payload[:] = bytes(len(payload))
    assert torch.equal(returned, before)
