"""The dispatcher, its algorithms at planted cases, and what they refuse."""

import math

import pytest
import torch

from polyrank.algebra import METHODS, LowRank, factorise
from polyrank.algebra.factorisations import accumulate
from polyrank.errors import FactorError, RankError

EXACT = ["auto", "gram", "qr", "dense"]


def spectrum(m: int, n: int, s: list[float], seed: int = 0) -> LowRank:
    """Return U·diag(s)·Vᵀ in float64 as B = UΣ, A = Vᵀ."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(s), generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(s), generator=draw, dtype=torch.float64)).Q
    return LowRank(u * torch.tensor(s, dtype=torch.float64), v.T)


def mixed(delta: LowRank, seed: int = 1) -> LowRank:
    """Return the same product under a random gauge (BG, G⁻¹A)."""
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(delta.rank, delta.rank, generator=draw, dtype=delta.b.dtype)
    return LowRank(delta.b @ g, torch.linalg.solve(g, delta.a))


def error(delta: torch.Tensor | LowRank, found) -> float:
    """Return ‖D − X‖ / ‖D‖ in float64."""
    d = delta.dense() if isinstance(delta, LowRank) else delta
    return float((d.double() - found.lowrank().dense().double()).norm() / d.double().norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (600, 560)])
def test_planted_singular_values_are_found_and_the_rest_is_counted_as_discarded(method, shape):
    planted = [8.0, 4.0, 2.0, 1.0, 0.5]
    found = factorise(mixed(spectrum(*shape, planted)), 3, method=method)
    torch.testing.assert_close(found.s, torch.tensor(planted[:3], dtype=torch.float64))
    assert found.energy == pytest.approx(sum(s * s for s in planted))
    assert found.discarded == pytest.approx(1.25)
    assert found.shape == shape
    for q in (found.u, found.v):
        torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_the_dtype_of_the_terms_is_that_of_the_result(method):
    delta = spectrum(30, 20, [3.0, 2.0])
    for given, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        found = factorise(delta.to(dtype=given), 2, method=method)
        assert (found.u.dtype, found.s.dtype, found.v.dtype) == (expected,) * 3
    both = factorise([delta.to(dtype=torch.float32), delta], 2, method=method)
    assert both.u.dtype == torch.float64


def test_auto_chooses_by_dtype_and_by_the_rank_of_the_stack():
    def chosen(rank, dtype):
        return factorise(spectrum(40, 40, [1.0] * rank).to(dtype=dtype), 4).method

    assert chosen(8, torch.float32) == "gram"
    assert chosen(8, torch.float64) == "qr"
    assert chosen(31, torch.float32) == chosen(31, torch.float64) == "dense"


@pytest.mark.parametrize("method", METHODS)
def test_largest_entry_of_each_left_vector_is_positive(method):
    for shape in [(40, 30), (30, 40), (560, 600)]:
        delta = spectrum(*shape, [5.0, 4.0, 3.0, 2.0])
        for one in (delta, delta.scale(-1.0)):
            u = factorise(one.to(dtype=torch.float32), 4, method=method).u
            assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_bits(method):
    delta = mixed(spectrum(40, 30, [5.0, 4.0, 3.0, 2.0])).to(dtype=torch.float32)
    one, two = (factorise(delta, 3, method=method, seed=7) for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.v, two.v)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_has_no_direction_and_pads_to_any_rank(method, dtype):
    nothing = [
        LowRank.zero(6, 5, dtype=dtype),
        LowRank(torch.zeros(6, 3, dtype=dtype), torch.ones(3, 5, dtype=dtype)),
    ]
    for terms in (nothing[:1], nothing[1:], nothing):
        found = factorise(terms, 4, method=method)
        assert (found.rank, found.energy, found.discarded) == (0, 0.0, 0.0)
        assert found.lowrank(4).rank == 4
        assert torch.equal(found.lowrank(4).dense(), torch.zeros(6, 5, dtype=dtype))


@pytest.mark.parametrize("method", EXACT)
def test_a_rank_above_that_of_the_matrix_gives_all_of_it(method):
    delta = mixed(spectrum(9, 5, [3.0, 2.0, 1.0]))
    for rank in (3, 5, 100):
        found = factorise(delta, rank, method=method)
        assert found.rank == 3
        assert error(delta, found) < 1e-14
        assert found.discarded == 0.0


@pytest.mark.parametrize("method", EXACT)
def test_small_singular_values_of_single_precision_factors_are_kept(method):
    planted = [10.0**-j for j in range(8)]
    delta = spectrum(600, 560, planted).to(dtype=torch.float32)
    found = factorise(delta, 8, method=method)
    assert found.rank == 8
    # A float32 Gram matrix loses all below 3e-4 and a float64 one, used alone, below 1e-8. Forming
    # D in float32 (method dense) itself leaves noise of about 1e-7·σ₁.
    trusted = 6 if method == "dense" else 8
    expected = torch.linalg.svdvals(delta.to(dtype=torch.float64).dense())
    torch.testing.assert_close(
        found.s.double()[:trusted], expected[:trusted], rtol=2e-2 if method == "dense" else 1e-5,
        atol=0.0,
    )  # fmt: skip
    assert error(delta.to(dtype=torch.float64), found) < 2e-7


@pytest.mark.parametrize("method", ["auto", "gram"])
def test_terms_that_cancel_go_to_the_strict_path(method):
    big = spectrum(60, 50, [1.0] * 6).to(dtype=torch.float32)
    small = spectrum(60, 50, [1.0] * 3, seed=5).scale(1e-6).to(dtype=torch.float32)
    terms = [big, small, big.scale(-1.0)]
    found = factorise(terms, 4, method=method)
    assert found.method == "qr"
    assert found.rank == 3
    assert error(small.to(dtype=torch.float64), found) < 1e-6


def test_a_badly_scaled_gauge_changes_nothing():
    delta = spectrum(60, 50, [4.0, 3.0, 2.0, 1.0]).to(dtype=torch.float32)
    gauge = torch.tensor([1e-15, 1e-6, 1.0, 1e15])
    found = factorise(LowRank(delta.b * gauge, delta.a / gauge[:, None]), 4)
    assert found.method == "gram"
    assert error(delta, found) < 2e-7


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_terms_are_read_once_and_dropped_when_accumulated(method):
    alive = []

    class Counted(LowRank):
        def __del__(self):
            alive.pop()

    most = 0

    def terms():
        nonlocal most
        for i in range(200):
            term = spectrum(40, 30, [1.0, 0.5, 0.25, 0.125], seed=i)
            alive.append(None)
            most = max(most, len(alive))
            yield Counted(term.b, term.a)

    found = factorise(terms(), 8, method=method)
    assert found.method == "dense"
    assert most <= 64  # 256 columns of pending terms at most
    expected = sum(spectrum(40, 30, [1.0, 0.5, 0.25, 0.125], seed=i).dense() for i in range(200))
    exact = torch.linalg.svdvals(expected)
    assert found.discarded == pytest.approx(float(exact[8:].square().sum()))


def test_dense_takes_both_orientations_and_more_rows_than_one_block():
    for shape in [(1100, 60), (60, 1100), (50, 50)]:
        delta = spectrum(*shape, [3.0, 2.0, 1.0]).to(dtype=torch.float32)
        found = factorise(delta, 2, method="dense")
        assert found.discarded == pytest.approx(1.0, rel=1e-5)
        assert error(spectrum(*shape, [3.0, 2.0, 1.0]), found) == pytest.approx(
            1 / math.sqrt(14), rel=1e-6
        )


def test_the_sum_of_terms_of_all_ranks_is_that_of_a_plain_loop():
    terms = [
        spectrum(300, 280, [1.0] * r, seed=i).to(dtype=torch.float32)
        for i, r in enumerate([3, 200, 0, 8, 255, 1, 280, 30])
    ]
    expected = sum(term.to(dtype=torch.float64).dense() for term in terms)
    torch.testing.assert_close(accumulate(iter(terms)).double(), expected, rtol=0, atol=1e-6)
    wide = accumulate(iter([*terms, spectrum(300, 280, [1.0])]))
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_refused_by_position(method, bad):
    good = spectrum(6, 5, [1.0])
    wrong = LowRank(torch.full_like(good.b, bad), good.a)
    with pytest.raises(FactorError, match="term 1"):
        factorise([good, wrong], 2, method=method)


def test_no_terms_other_shapes_a_rank_of_zero_and_unknown_methods_are_refused():
    good = spectrum(6, 5, [1.0])
    with pytest.raises(FactorError, match="at least one"):
        factorise([], 2)
    with pytest.raises(FactorError, match="term 1"):
        factorise([good, spectrum(5, 6, [1.0])], 2)
    with pytest.raises(RankError, match="1 or more"):
        factorise(good, 0)
    with pytest.raises(ValueError, match="unknown method 'svd'"):
        factorise(good, 1, method="svd")


def test_lowrank_cuts_and_pads_in_the_order_of_singular_values():
    found = factorise(spectrum(9, 7, [3.0, 2.0, 1.0]), 3)
    assert found.lowrank(1).norm() == pytest.approx(3.0)
    assert found.lowrank(5).norm() == pytest.approx(math.sqrt(14))
    assert found.lowrank(5).rank == 5
    with pytest.raises(RankError):
        found.lowrank(-1)
    with pytest.raises(RankError):
        found.padded(2)


def test_no_gradient_is_carried_into_the_result():
    delta = LowRank(torch.ones(6, 1, requires_grad=True), torch.ones(1, 5, requires_grad=True))
    for method in METHODS:
        assert not factorise(delta, 1, method=method).u.requires_grad
