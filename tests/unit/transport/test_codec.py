"""What the wire does to numbers: exact sizes, a stated bound, and nothing that is not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.errors import FrameError
from polyrank.transport import CODECS, codec
from polyrank.transport.codec import BF16, CODINGS, FLOAT32, FLOAT64, INT8

LOSSY = (BF16, INT8)
CASES = pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)


def there_and_back(coding, states):
    rows, width = states.shape
    return coding.decode(coding.encode(states, "here"), rows, width, "here")


def floats(width):
    return st.floats(allow_nan=False, allow_infinity=False, width=width)


def matrices(numbers, rows=4, width=5):
    return st.lists(
        st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=rows
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


@CASES
def test_the_length_is_exact(coding):
    for rows, width in ((1, 1), (3, 7), (5, 16)):
        written = coding.encode(torch.randn(rows, width), "here")
        assert len(written) == coding.nbytes(rows, width)


def test_the_lengths_are_those_that_are_documented():
    assert FLOAT64.nbytes(3, 5) == 3 * 5 * 8
    assert FLOAT32.nbytes(3, 5) == 3 * 5 * 4
    assert BF16.nbytes(3, 5) == 3 * 5 * 2
    assert INT8.nbytes(3, 5) == 3 * (4 + 5)


def test_int8_sends_gradients_as_bf16_and_the_others_send_both_alike():
    assert codec("int8").activations is INT8
    assert codec("int8").gradients is BF16
    for name in CODECS.keys() - {"int8"}:
        assert codec(name).activations is codec(name).gradients
        assert codec(name).activations.name == name


def test_an_unknown_wire_is_refused_with_the_known_ones():
    with pytest.raises(FrameError, match="float64, float32, bf16, int8; 'fp4' came"):
        codec("fp4")


@given(matrices(floats(64)))
def test_float64_is_exact(states):
    assert torch.equal(there_and_back(FLOAT64, states), states)


@given(matrices(floats(32)))
def test_float32_is_exact_for_float32(states):
    returned = there_and_back(FLOAT32, states.float())
    assert returned.dtype == torch.float32
    assert torch.equal(returned, states.float())


@given(matrices(st.floats(-1e30, 1e30)))
def test_what_is_lost_stays_inside_the_bound(states):
    for coding in (FLOAT32, *LOSSY):
        returned = there_and_back(coding, states).double()
        assert ((returned - states).abs() <= coding.bound(states)).all()


@given(matrices(st.floats(-1e-37, 1e-37)))
def test_the_bound_holds_next_to_zero(states):
    for coding in (FLOAT32, *LOSSY):
        returned = there_and_back(coding, states).double()
        assert ((returned - states).abs() <= coding.bound(states)).all()


def test_the_bounds_are_those_that_are_documented():
    states = torch.tensor([[1.0, -3.0, 0.5], [254.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(BF16.bound(states), states.abs() / 256)
    # 2^-14 is for the roundings to float32
    expected = torch.tensor([[3 / 254] * 3, [1.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(INT8.bound(states), expected, rtol=2.0**-13, atol=0)


def test_the_bound_is_nearly_reached():
    """A bound that nothing comes near to would prove nothing."""
    states = torch.randn(64, 512, dtype=torch.float64)
    for coding in LOSSY:
        lost = (there_and_back(coding, states).double() - states).abs()
        assert (lost / coding.bound(states)).max() > 0.9


@pytest.mark.parametrize("coding", LOSSY, ids=lambda coding: coding.name)
def test_a_lossy_wire_differs(coding):
    states = torch.randn(8, 32)
    returned = there_and_back(coding, states)
    assert returned.dtype == torch.float32
    assert (returned != states).float().mean() > 0.5


def test_a_token_of_zeros_stays_one_and_does_not_touch_the_others():
    states = torch.tensor([[0.0, 0.0, 0.0], [127.0, -127.0, 5.0], [0.0, 0.0, 0.0]])
    assert torch.equal(there_and_back(INT8, states), states)


def test_a_token_whose_scale_underflows_is_written_as_zeros():
    states = torch.tensor([[1e-45, -1e-45, 0.0]])
    assert states[0, 0] > 0
    assert bytes(INT8.encode(states, "here")) == bytes(4 + 3)


def test_a_large_token_does_not_coarsen_the_others():
    states = torch.tensor([[1e6, 2e6, 3e6], [0.1, 0.2, 0.3]])
    returned = there_and_back(INT8, states)
    torch.testing.assert_close(returned[1], states[1], rtol=0, atol=0.3 / 254 * 1.001)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@CASES
def test_what_is_not_finite_is_refused_by_the_sender(coding, wrong):
    states = torch.randn(3, 4)
    states[1, 2] = wrong
    with pytest.raises(FrameError, match="the sender: expected numbers that are finite"):
        coding.encode(states, "the sender")


@pytest.mark.parametrize("coding", [FLOAT32, BF16, INT8], ids=lambda coding: coding.name)
def test_what_becomes_infinite_on_the_wire_is_refused(coding):
    with pytest.raises(FrameError, match="too large"):
        coding.encode(torch.tensor([[1.0, 3.5e38]], dtype=torch.float64), "here")


@CASES
def test_what_is_not_finite_is_refused_by_the_receiver(coding):
    payload = bytearray(coding.encode(torch.randn(2, 4), "here"))
    payload[: coding.nbytes(1, 4) if coding is not INT8 else 4] = (
        b"\x00\x00\xc0\x7f" if coding is INT8 else b"\xff" * coding.nbytes(1, 4)
    )
    with pytest.raises(FrameError, match="the receiver"):
        coding.decode(memoryview(payload), 2, 4, "the receiver")


def test_a_negative_scale_is_refused():
    payload = bytearray(INT8.encode(torch.randn(2, 4), "here"))
    payload[3] |= 0x80
    with pytest.raises(FrameError, match="scales"):
        INT8.decode(memoryview(payload), 2, 4, "here")


@CASES
def test_a_payload_of_another_length_is_refused(coding):
    payload = coding.encode(torch.randn(2, 4), "here")
    for wrong in (payload[:-1], bytes(payload) + b"\x00", b""):
        with pytest.raises(FrameError, match="bytes of states"):
            coding.decode(memoryview(wrong), 2, 4, "here")


@CASES
def test_any_layout_and_a_graph_are_taken(coding):
    states = torch.randn(6, 4, requires_grad=True)
    across = states.t() * 1.0
    assert across.requires_grad
    assert not across.is_contiguous()
    expected = there_and_back(coding, across.detach().contiguous())
    assert torch.equal(there_and_back(coding, across), expected)


@CASES
def test_half_precision_states_are_taken(coding):
    states = torch.randn(3, 8).bfloat16()
    returned = there_and_back(coding, states).double()
    assert ((returned - states.double()).abs() <= coding.bound(states)).all()
    if coding is not INT8:
        assert torch.equal(returned, states.double())


@CASES
def test_what_is_received_shares_no_memory_with_the_frame(coding):
    payload = bytearray(coding.encode(torch.randn(2, 4), "here"))
    returned = coding.decode(memoryview(payload), 2, 4, "here")
    before = returned.clone()
    payload[:] = bytes(len(payload))
    assert torch.equal(returned, before)
