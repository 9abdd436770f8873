"""LowRank: exact sums, norms and inner products without products."""

import pytest
import torch

from polyrank.algebra import LowRank
from polyrank.errors import FactorError, PolyrankError, RankError


def planted(m: int, n: int, r: int, seed: int = 0, dtype=torch.float64) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=draw, dtype=dtype)
    return LowRank(b, torch.randn(r, n, generator=draw, dtype=dtype))


def test_adding_is_stacking_and_exact():
    one, other = planted(7, 5, 2), planted(7, 5, 3, seed=1)
    total = one + other
    assert total.rank == 5
    torch.testing.assert_close(total.dense(), one.dense() + other.dense())
    torch.testing.assert_close((one - other).dense(), one.dense() - other.dense())


def test_norm_and_inner_equal_those_of_the_products():
    for r in (0, 1, 3, 5, 9):
        one, other = planted(7, 5, r), planted(7, 5, 2, seed=1)
        assert one.norm() == pytest.approx(float(one.dense().norm()), rel=1e-12)
        assert one.inner(other) == pytest.approx(float((one.dense() * other.dense()).sum()))


def test_norm_of_a_tiny_difference_keeps_its_digits():
    one = planted(50, 40, 4)
    nudge = planted(50, 40, 1, seed=1).scale(1e-12)
    difference = (one + nudge) - one
    # Through the Gram matrix this would be sqrt(1e-16)·‖one‖, ten thousand times too large.
    assert difference.norm() == pytest.approx(nudge.norm(), rel=1e-2)


def test_norm_does_not_overflow_in_single_precision():
    big = planted(6, 6, 2, dtype=torch.float32).scale(1e30)
    assert big.norm() == pytest.approx(float(big.dense().double().norm()), rel=1e-6)


def test_rank_one_is_never_broadcast():
    with pytest.raises(FactorError, match="nothing is broadcast"):
        LowRank(torch.ones(4, 1), torch.ones(3, 5))
    with pytest.raises(FactorError, match="different shapes"):
        planted(4, 1, 1) + planted(4, 5, 1)


@pytest.mark.parametrize(
    ("b", "a"),
    [
        (torch.ones(4), torch.ones(4, 4)),
        (torch.ones(4, 2), torch.ones(2, 4, dtype=torch.float64)),
        (torch.ones(1, 4, 2), torch.ones(1, 2, 4)),
    ],
)
def test_factors_that_do_not_fit_are_refused(b, a):
    with pytest.raises(FactorError) as caught:
        LowRank(b, a)
    assert isinstance(caught.value, PolyrankError)
    assert isinstance(caught.value, ValueError)


def test_stack_needs_a_term():
    with pytest.raises(FactorError, match="at least one"):
        LowRank.stack([])


def test_prefix_is_the_first_directions_and_copies_nothing():
    delta = planted(7, 5, 4)
    first = delta.prefix(2)
    torch.testing.assert_close(first.dense(), delta.b[:, :2] @ delta.a[:2])
    assert first.b.data_ptr() == delta.b.data_ptr()
    for rank in (-1, 5):
        with pytest.raises(RankError, match=r"0…4"):
            delta.prefix(rank)


def test_transpose_and_product_with_a_matrix_equal_the_dense_ones():
    delta = planted(7, 5, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(delta @ x, delta.dense() @ x)
    torch.testing.assert_close(delta.T.dense(), delta.dense().T)


def test_zero_has_no_rank_and_no_bytes():
    zero = LowRank.zero(3, 4)
    assert (zero.rank, zero.nbytes, zero.norm()) == (0, 0, 0.0)
    assert torch.equal(zero.dense(), torch.zeros(3, 4))
    assert torch.equal((zero + zero).dense(), torch.zeros(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_sees_either_factor(bad):
    delta = planted(3, 4, 2)
    assert delta.is_finite()
    for factor in (delta.b, delta.a):
        kept = factor[0, 0].item()
        factor[0, 0] = bad
        assert not delta.is_finite()
        factor[0, 0] = kept
    huge = LowRank(torch.full((4, 3), 3e38), torch.full((3, 5), -3e38))
    assert huge.is_finite(), "entries are finite though their sum is not"
