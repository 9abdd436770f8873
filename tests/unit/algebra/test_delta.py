"""Updates of one matrix in three forms: factors, whole, at few entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.algebra import Adapter, Dense, LowRank, Sparse, distance, from_tensors
from polyrank.algebra.delta import added
from polyrank.errors import FactorError

SHAPE = (5, 4)


def made(kind, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    if kind == "lowrank":
        return LowRank(
            torch.randn(5, 2, generator=draw, dtype=dtype),
            torch.randn(2, 4, generator=draw, dtype=dtype),
        )
    if kind == "dense":
        return Dense(torch.randn(SHAPE, generator=draw, dtype=dtype))
    positions = torch.randperm(20, generator=draw)[:7]
    return Sparse(torch.randn(7, generator=draw, dtype=dtype), positions, SHAPE)


KINDS = ("lowrank", "dense", "sparse")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_norm_and_scale_are_those_of_the_matrix(kind):
    delta = made(kind)
    assert delta.dense().shape == delta.shape == SHAPE
    assert delta.norm() == pytest.approx(float(delta.dense().norm()), rel=1e-12)
    assert torch.equal(delta.scale(-2.0).dense(), -2.0 * delta.dense())
    assert torch.linalg.matrix_rank(delta.dense()) <= delta.rank


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
@given(st.integers(0, 50), st.integers(51, 99))
def test_sums_and_distances_are_those_of_the_matrices(one, other, seed, another):
    first, second = made(one, seed), made(other, another)
    total = added(first, second)
    assert torch.allclose(total.dense(), first.dense() + second.dense(), atol=1e-14)
    apart = float((first.dense() - second.dense()).norm())
    assert distance(first, second) == pytest.approx(apart, rel=1e-12)
    assert distance(first, first) == pytest.approx(0.0, abs=1e-12)


def test_only_factors_stay_factors_in_a_sum():
    assert isinstance(added(made("lowrank"), made("lowrank", 1)), LowRank)
    assert isinstance(added(made("lowrank"), made("sparse")), Dense)


@every_kind
def test_tensors_give_the_same_update_back(kind):
    delta = made(kind)
    again = from_tensors(delta.tensors())
    assert type(again) is type(delta)
    assert torch.equal(again.dense(), delta.dense())
    assert Adapter({"q": again}).hash() == Adapter({"q": delta}).hash()


def test_tensors_of_no_kind_are_refused():
    with pytest.raises(FactorError, match=r"no kind is made of \['a', 'values'\]"):
        from_tensors({"a": torch.zeros(1), "values": torch.zeros(1)})


@every_kind
def test_an_infinity_or_nan_is_seen(kind):
    delta = made(kind)
    assert delta.is_finite()
    for bad in (float("nan"), float("inf")):
        broken = {name: tensor.clone() for name, tensor in delta.tensors().items()}
        next(iter(broken.values())).view(-1)[0] = bad
        assert not from_tensors(broken).is_finite()


@every_kind
def test_another_dtype_keeps_the_kind_and_the_positions(kind):
    narrow = made(kind).to(dtype=torch.float32)
    assert type(narrow) is type(made(kind))
    assert narrow.dense().dtype == torch.float32
    assert torch.allclose(narrow.dense().double(), made(kind).dense(), atol=1e-5)


def test_hashes_of_adapters_tell_kinds_and_entries_apart():
    sparse = made("sparse")
    moved = Sparse(sparse.values, sparse.positions.roll(1), SHAPE)
    taller = Sparse(sparse.values, sparse.positions, (4, 5))
    adapters = [{"q": sparse}, {"q": moved}, {"q": taller}, {"q": Dense(sparse.dense())}]
    assert len({Adapter(one).hash() for one in adapters}) == 4


def test_what_travels_of_a_sparse_update_are_its_values():
    assert made("sparse", dtype=torch.float32).nbytes == 7 * 4
    assert made("dense", dtype=torch.float32).nbytes == 20 * 4


def test_adapters_of_unlike_kinds_add_site_by_site():
    total = Adapter({"q": made("lowrank")}) + Adapter({"q": made("sparse"), "v": made("dense")})
    assert torch.allclose(total["q"].dense(), made("lowrank").dense() + made("sparse").dense())
    assert torch.equal(total["v"].dense(), made("dense").dense())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Dense(torch.zeros(3)), "expected an m×n matrix"),
        (lambda: Sparse(torch.zeros(3), torch.zeros(2, dtype=torch.int64), SHAPE), "one position"),
        (lambda: added(made("dense"), Dense(torch.zeros(4, 5))), "shapes"),
        (lambda: distance(made("dense"), Dense(torch.zeros(4, 5))), "shapes"),
    ],
)
def test_what_does_not_fit_is_refused(bad, message):
    with pytest.raises(FactorError, match=message):
        bad()
