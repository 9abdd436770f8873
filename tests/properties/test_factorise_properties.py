"""factorise against the dense float64 SVD, over shapes, ranks, spectra and degenerate stacks.

Products are compared, and the *excess* ‖D − X‖ over the smallest possible error: singular vectors
are not unique, and where σ_r = σ_{r+1} not even the product is.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyrank.algebra import LowRank, factorise
from polyrank.algebra.factorisations import factor_randomised
from polyrank.algebra.factorisations.randomised import MOST_EXCESS

# (1e-6‖D‖)-safe methods and the excess error that each is held to, relative to ‖D‖.
EXACT = ["auto", "gram", "qr", "dense"]
EXCESS = {torch.float32: 1e-6, torch.float64: 1e-13}
GRAM_IN_DOUBLE = 1e-7  # by name on float64 terms, the squared condition number shows

relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])


@st.composite
def stacks(draw):
    """Draw stacks as they come from clients: independent, collinear, graded, or with zeros."""
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    ranks = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    kind = draw(st.sampled_from(["independent", "collinear", "graded", "sparse", "cancelling"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    common = normal(m, 12), normal(12, n)
    terms = []
    for r in ranks:
        b, a = normal(m, r), normal(r, n)
        if kind in ("collinear", "cancelling"):
            b, a = common[0][:, :r] + 1e-4 * b, common[1][:r] + 1e-4 * a
        if kind == "graded":
            b = b * torch.logspace(0, -9, r, dtype=torch.float64)
        if kind == "sparse":
            b = b * (torch.rand(r, generator=rng) < 0.5)
        weight = -1.0 if kind == "cancelling" and len(terms) % 2 else 1.0
        terms.append(LowRank(weight * b.to(dtype), a.to(dtype)))
    return terms, draw(st.integers(1, 20))


@pytest.mark.parametrize("method", EXACT)
@given(case=stacks())
@relaxed
def test_the_error_exceeds_the_optimum_by_rounding_only(method, case):
    terms, rank = case
    dtype = terms[0].b.dtype
    d = sum(term.to(dtype=torch.float64).dense() for term in terms)
    s = torch.linalg.svdvals(d)
    optimum = float(s[rank:].square().sum().sqrt())
    found = factorise(iter(terms), rank, method=method)
    x = found.lowrank().to(dtype=torch.float64).dense()
    # Terms that cancel leave a D of which their own dtype keeps fewer digits when it is summed
    # densely; the stacked paths owe ‖D‖ all the same.
    summed = math.fsum(term.norm() for term in terms)
    scale = summed if found.method == "dense" else float(d.norm())
    allowed = EXCESS[dtype] * scale
    if found.method == "gram" and dtype == torch.float64:
        allowed = GRAM_IN_DOUBLE * scale
    if dtype == torch.float64:
        allowed = max(allowed, EXCESS[dtype] * summed)
    assert float((d - x).norm()) - optimum <= allowed
    assert found.rank <= min(rank, *d.shape)
    assert (found.s[1:] <= found.s[:-1] * (1 + 1e-6)).all()


@given(case=stacks())
@relaxed
def test_energy_and_discarded_energy_are_those_of_the_dense_matrix(case):
    terms, rank = case
    d = sum(term.to(dtype=torch.float64).dense() for term in terms)
    found = factorise(iter(terms), rank)
    x = found.lowrank().to(dtype=torch.float64).dense()
    scale = math.fsum(term.norm() for term in terms) ** 2
    assert found.energy == pytest.approx(float(d.square().sum()), abs=1e-6 * scale, rel=1e-6)
    assert found.discarded == pytest.approx(float((d - x).square().sum()), abs=1e-6 * scale)


@given(case=stacks(), seed=st.integers(0, 1000))
@relaxed
def test_the_product_does_not_depend_on_order_or_gauge(case, seed):
    terms, rank = case
    terms = [term.to(dtype=torch.float64) for term in terms]
    draw = torch.Generator().manual_seed(seed)

    def turned(term):
        g = torch.randn(term.rank, term.rank, generator=draw, dtype=torch.float64)
        g = torch.linalg.qr(g).Q * 3.0
        return LowRank(term.b @ g, g.T @ term.a / 9.0)

    d = sum(term.dense() for term in terms)
    s = torch.nn.functional.pad(torch.linalg.svdvals(d), (0, 1))
    if rank < s.shape[0] and s[rank - 1] - s[rank] < 1e-3 * s[0]:
        return  # no gap: the best approximation is not unique
    one = factorise(terms, rank).lowrank().dense()
    other = factorise([turned(term) for term in reversed(terms)], rank).lowrank().dense()
    scale = math.fsum(term.norm() for term in terms)
    assert float((one - other).norm()) <= 1e-9 * scale


@st.composite
def thick(draw):
    """Draw a dense matrix of any smooth or broken spectrum, a rank, and a start or none."""
    m, n = draw(st.integers(60, 160)), draw(st.integers(60, 160))
    size, rank = min(m, n), draw(st.integers(1, 12))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    u = torch.linalg.qr(torch.randn(m, size, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(n, size, generator=rng)).Q
    kind = draw(st.sampled_from(["power", "exponential", "steps", "random"]))
    j = torch.arange(1, size + 1).float()
    decay = draw(st.floats(0.0, 2.0))
    s = {
        "power": j**-decay,
        "exponential": torch.exp(-decay * j / 10),
        "steps": 1 / (1 + decay * (j / draw(st.integers(1, 30))).floor()),
        "random": torch.rand(size, generator=rng).sort(descending=True).values,
    }[kind]
    first = draw(st.sampled_from([None, 0, rank // 2, rank, size - rank]))
    warm = None if first is None else v[:, first : first + rank]
    return (u * s) @ v.T, rank, warm


@given(case=thick(), seed=st.integers(0, 1000))
@relaxed
def test_randomised_keeps_its_promised_excess_from_any_start(case, seed):
    d, rank, warm = case
    s = torch.linalg.svdvals(d.double())
    found = factor_randomised(d, rank, warm=warm, seed=seed)
    error = float((d.double() - found.lowrank().dense().double()).norm())
    assert error - float(s[rank:].square().sum().sqrt()) <= MOST_EXCESS * float(d.double().norm())


@given(case=stacks(), seed=st.integers(0, 1000))
@relaxed
def test_randomised_keeps_its_promised_excess_on_the_stacks_of_clients(case, seed):
    terms, rank = case
    d = sum(term.to(dtype=torch.float64).dense() for term in terms)
    optimum = float(torch.linalg.svdvals(d)[rank:].square().sum().sqrt())
    found = factorise(terms, rank, method="randomised", seed=seed)
    x = found.lowrank().to(dtype=torch.float64).dense()
    # Beside the promise, what terms that cancel lose when they are summed in their own dtype.
    rounding = 1e-6 * math.fsum(term.norm() for term in terms)
    assert float((d - x).norm()) - optimum <= MOST_EXCESS * float(d.norm()) + rounding
