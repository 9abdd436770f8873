"""What holds for the codecs at hand: their documented sizes and bounds, and int8's scales."""

import subprocess
import sys

import pytest
import torch

from polyrank.codecs import codec
from polyrank.errors import FrameError

FLOAT64, FLOAT32, BF16, INT8 = (
    codec(name).activations for name in ("float64", "float32", "bf16", "int8")
)


def there_and_back(numbers, states):
    rows, width = states.shape
    return numbers.decode(numbers.encode(states, "here"), rows, width, "here")


def test_the_lengths_are_those_that_are_documented():
    assert FLOAT64.nbytes(3, 5) == 3 * 5 * 8
    assert FLOAT32.nbytes(3, 5) == 3 * 5 * 4
    assert BF16.nbytes(3, 5) == 3 * 5 * 2
    assert INT8.nbytes(3, 5) == 3 * (4 + 5)


def test_int8_sends_gradients_as_bf16_and_the_others_send_both_alike():
    assert codec("int8").gradients is BF16
    for name in ("float64", "float32", "bf16"):
        assert codec(name).activations is codec(name).gradients
        assert codec(name).activations.name == name


def test_the_bounds_are_those_that_are_documented():
    states = torch.tensor([[1.0, -3.0, 0.5], [254.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(BF16.bound(states), states.abs() / 256)
    # 2^-14 is for the roundings to float32
    expected = torch.tensor([[3 / 254] * 3, [1.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(INT8.bound(states), expected, rtol=2.0**-13, atol=0)


def test_float64_is_exact():
    states = torch.randn(4, 5, dtype=torch.float64) * 1e300
    assert torch.equal(there_and_back(FLOAT64, states), states)


def test_bf16_keeps_states_in_bf16():
    states = torch.randn(3, 8).bfloat16()
    assert torch.equal(there_and_back(BF16, states), states.float())


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


def test_a_negative_scale_is_refused():
    payload = bytearray(INT8.encode(torch.randn(2, 4), "here"))
    payload[3] |= 0x80
    with pytest.raises(FrameError, match="scales"):
        INT8.decode(memoryview(payload), 2, 4, "here")


def test_the_names_are_known_without_torch():
    """A recipe with a wrong wire is refused at once."""
    script = "import sys; from polyrank.codecs import CODECS; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
