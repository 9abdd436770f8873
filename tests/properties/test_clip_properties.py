"""Shortening against dense float64: the bound holds, and no longer way would meet it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.rounds.clipping import clipped

relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[*HealthCheck])

STARTS = st.sampled_from(["zero B", "both", "fixed A"])
KINDS = st.sampled_from(["low rank", "low rank", "opposed", "sparse", "dense"])


@st.composite
def answers(draw):
    """Draw an assignment of some sites of all kinds, and a client's answer to it."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    begun, size = draw(STARTS), draw(st.sampled_from([1e-3, 1.0, 30.0]))

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=dtype)

    start, came = {}, {}
    for site in range(draw(st.integers(1, 3))):
        m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        r, kind = draw(st.integers(0, 7)), draw(KINDS)
        name = f"s{site}"
        if kind == "dense":
            start[name] = Dense(normal(m, n))
            came[name] = Dense(start[name].matrix + size * normal(m, n))
        elif kind == "sparse":
            positions = torch.randperm(m * n, generator=rng)[: draw(st.integers(1, m * n))]
            start[name] = Sparse(normal(len(positions)), positions, (m, n))
            values = start[name].values + size * normal(len(positions))
            came[name] = Sparse(values, positions, (m, n))
        else:
            b = torch.zeros(m, r, dtype=dtype) if begun == "zero B" else normal(m, r)
            a = normal(r, n)
            start[name] = LowRank(b, a)
            # Opposed: A turns against itself, and the increment falls again on its way.
            turned = -draw(st.floats(0.5, 1.2)) * a if kind == "opposed" else size * normal(r, n)
            after = a if begun == "fixed A" else a + turned
            came[name] = LowRank(b + size * normal(m, r), after)
    train = "b" if begun == "fixed A" else "both"
    assignment = Assignment(Adapter(start), dict.fromkeys(start, 1.0), train=train)
    update = Update("c", 1, 0, assignment.hash(), 3, Adapter(came), {"loss": 1.0})
    return assignment, update


def dense(delta):
    """The matrix in float64: factors are widened before they are multiplied."""
    return delta.to(dtype=torch.float64).dense()


def reached(assignment, adapter):
    parts = [(dense(adapter[s]) - dense(d)).reshape(-1) for s, d in assignment.start.items()]
    return float(torch.cat(parts).norm())


def along(assignment, update, c):
    """‖W(c) − W(0)‖ by dense matrices in float64, without rounding to the update's dtype."""
    total = 0.0
    for site, start in assignment.start.items():
        came = update.adapter[site]
        if isinstance(start, LowRank):
            b, a = start.b.double(), start.a.double()
            moved = (b + c * (came.b.double() - b)) @ (a + c * (came.a.double() - a)) - b @ a
        else:
            moved = c * (dense(came) - dense(start))
        total += float(moved.square().sum())
    return total**0.5


@relaxed
@given(answers(), st.floats(0.01, 0.99))
def test_the_bound_holds_and_no_longer_way_meets_it(given_, part):
    assignment, update = given_
    whole = reached(assignment, update.adapter)
    bound = part * whole
    if not bound:
        return
    found, c = clipped(update, assignment, bound)
    assert 0 < c < 1
    # The oracle rounds products of entries up to thirty in float64.
    assert reached(assignment, found.adapter) <= bound * (1 + 1e-9) + 1e-13
    # What was sent has entries of one to three: float32 rounds them by up to 2e-7 each, and the
    # increment by up to a millionth of its own.
    tensors = [t for delta in update.adapter.values() for t in delta.tensors().values()]
    single = any(tensor.dtype == torch.float32 for tensor in tensors)
    slack = 1e-5 + 1e-6 * bound if single else 1e-9
    beyond = [c + (1 - c) * k / 50 for k in range(1, 51)]
    assert all(along(assignment, update, far) > bound * (1 - 1e-9) - slack for far in beyond)
    assert along(assignment, update, c) >= bound * (1 - 1e-6) - slack


@relaxed
@given(answers(), st.floats(0.01, 0.99))
def test_what_is_shortened_is_still_an_answer_to_what_was_sent(given_, part):
    assignment, update = given_
    bound = part * reached(assignment, update.adapter)
    if not bound:
        return
    found, c = clipped(update, assignment, bound)
    for site, start in assignment.start.items():
        before, after = update.adapter[site], found.adapter[site]
        assert type(after) is type(start)
        assert (after.shape, after.rank) == (start.shape, start.rank)
        for name, tensor in after.tensors().items():
            came, assigned = before.tensors()[name], start.tensors()[name]
            assert tensor.dtype == came.dtype
            if name in ("positions", "shape") or (name == "a" and assignment.train == "b"):
                assert torch.equal(tensor, assigned)
                continue
            expected = assigned.double() + c * (came.double() - assigned.double())
            assert torch.equal(tensor, expected.to(came.dtype))


@relaxed
@given(answers(), st.floats(1.0, 3.0))
def test_what_meets_the_bound_is_not_touched(given_, room):
    assignment, update = given_
    bound = room * reached(assignment, update.adapter) * (1 + 1e-12) + 1e-12
    found, c = clipped(update, assignment, bound)
    assert c == 1.0
    assert found is update


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_holds_in_narrow_numbers_too(dtype):
    rng = torch.Generator().manual_seed(0)
    start = LowRank(torch.randn(8, 3, generator=rng), torch.randn(3, 6, generator=rng)).to(
        dtype=dtype
    )
    came = LowRank(start.b + 1, start.a - 1)
    assignment = Assignment(Adapter({"q": start}), {"q": 1.0})
    update = Update("c", 1, 0, assignment.hash(), 3, Adapter({"q": came}))
    for bound in (3.0, 0.1, 1e-4, 1e-9):
        found, c = clipped(update, assignment, bound)
        assert found.adapter["q"].b.dtype == dtype
        assert 0 < c < 1
        assert reached(assignment, found.adapter) <= bound
