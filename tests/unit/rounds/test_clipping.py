"""Shortening by hand: which crossing, which error, and that the direction among sites stays."""

from dataclasses import replace

import pytest
import torch

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import UpdateError
from polyrank.rounds import clipping as clip
from polyrank.rounds.clipping import clipped, increment, moved


def answered(start, came) -> tuple[Update, Assignment]:
    assignment = Assignment(Adapter(start), dict.fromkeys(start, 1.0))
    return Update("c", 1, 0, assignment.hash(), 3, Adapter(came)), assignment


def numbers(b: float, a: float) -> LowRank:
    """A 1×1 matrix of rank 1, so that everything can be worked out by hand."""
    return LowRank(torch.tensor([[b]]).double(), torch.tensor([[a]]).double())


@pytest.mark.parametrize(
    ("bound", "c"),
    [
        # B = 1 + 3c, A = 1 − 2c: the increment c − 6c² rises to 1/24, is 0 at 1/6, and −5 at 1.
        (1.0, (1 + 5.0) / 12),
        (0.01, (1 + 1.24**0.5) / 12),
        (1 / 24, (1 + 2**0.5) / 12),
    ],
)
def test_where_the_way_turns_back_the_last_crossing_counts(bound, c):
    update, assignment = answered({"q": numbers(1.0, 1.0)}, {"q": numbers(4.0, -1.0)})
    found, factor = clipped(update, assignment, bound)
    assert factor == pytest.approx(c, rel=1e-6)
    assert increment(assignment.start["q"], found.adapter["q"]) == pytest.approx(bound, rel=1e-6)
    assert increment(assignment.start["q"], found.adapter["q"]) <= bound


def test_a_hump_before_the_end_does_not_count_where_the_end_meets_the_bound():
    # B = 1 + c, A = 1 − c/2: the increment is c/2 − c²/2, largest half way, and 0 at the end.
    update, assignment = answered({"q": numbers(1.0, 1.0)}, {"q": numbers(2.0, 0.5)})
    assert clipped(update, assignment, 0.01) == (update, 1.0)


def test_an_end_just_beyond_the_bound_behind_a_dip_is_on_the_last_rise():
    # B = 1 + 5c, A = 1 − c: the increment 4c − 5c² is 0.8 at 0.4, 0 at 0.8, −1 at 1.
    update, assignment = answered({"q": numbers(1.0, 1.0)}, {"q": numbers(6.0, 0.0)})
    _, factor = clipped(update, assignment, 0.9)
    assert factor == pytest.approx((4 + 34**0.5) / 10, rel=1e-6)


def test_the_first_rise_counts_where_nothing_behind_it_meets_the_bound():
    update, assignment = answered({"q": numbers(1.0, 1.0)}, {"q": numbers(3.0, 0.9)})
    _, factor = clipped(update, assignment, 0.5)  # 1.9c − 0.2c², still rising at 1
    assert factor == pytest.approx((1.9 - 3.21**0.5) / 0.4, rel=1e-6)


def test_one_factor_holds_for_all_sites():
    start = {
        "d": Dense(torch.ones(2, 2)),
        "s": Sparse(torch.zeros(2), torch.tensor([0, 3]), (2, 2)),
    }
    came = {
        "d": Dense(torch.full((2, 2), 4.0)),
        "s": Sparse(torch.tensor([8.0, 0.0]), torch.tensor([0, 3]), (2, 2)),
    }
    update, assignment = answered(start, came)
    assert moved(update.adapter, assignment) == 10.0
    found, factor = clipped(update, assignment, 5.0)
    assert factor == pytest.approx(0.5, rel=1e-6)
    torch.testing.assert_close(found.adapter["d"].matrix, torch.full((2, 2), 2.5))
    torch.testing.assert_close(found.adapter["s"].values, torch.tensor([4.0, 0.0]))
    assert (found.client, found.metrics, found.assignment) == ("c", {}, assignment.hash())


def test_a_fresh_start_is_zero_however_large_its_a():
    rng = torch.Generator().manual_seed(1)
    a = 100 * torch.randn(2, 5, generator=rng)
    start = LowRank(torch.zeros(4, 2), a)
    came = LowRank(torch.randn(4, 2, generator=rng), a + torch.randn(2, 5, generator=rng))
    update, assignment = answered({"q": start}, {"q": came})
    found, factor = clipped(update, assignment, 1.0)
    assert 0 < factor < 1
    assert float(found.adapter["q"].dense().double().norm()) == pytest.approx(1.0, rel=1e-5)


def test_matrices_are_not_formed(monkeypatch):
    def forbidden(self):
        raise AssertionError(self.shape)

    rng = torch.Generator().manual_seed(2)
    start = LowRank(torch.randn(30, 2, generator=rng), torch.randn(2, 40, generator=rng))
    update, assignment = answered({"q": start}, {"q": LowRank(start.b + 1, start.a + 1)})
    monkeypatch.setattr(LowRank, "dense", forbidden)
    assert clipped(update, assignment, 1.0)[1] < 1
    sizes = []
    real = torch.linalg.qr
    monkeypatch.setattr(
        torch.linalg, "qr", lambda x, **way: sizes.append(x.shape[1]) or real(x, **way)
    )
    clipped(update, assignment, 1.0)
    assert max(sizes) <= 4, "two stacked ranks"


def test_what_no_number_can_hold_is_refused():
    update, assignment = answered({"q": numbers(0.0, 1.0)}, {"q": numbers(1e200, 1e200)})
    with pytest.raises(UpdateError, match="too large to be measured"):
        clipped(update, assignment, 1.0)
    start = LowRank(torch.ones(1, 1), torch.ones(1, 1))
    came = LowRank(torch.full((1, 1), 3.0).bfloat16(), torch.ones(1, 1).bfloat16())
    update, assignment = answered({"q": LowRank(start.b * 1.001, start.a)}, {"q": came})
    with pytest.raises(UpdateError, match="below the rounding of its numbers"):
        clipped(update, assignment, 1e-6)  # 1.001 is no bfloat16.


def test_rounding_on_a_coarse_grid_costs_little_of_the_way():
    # One float32 near 3: the grid of results is coarser than what they are beyond the bound.
    start = LowRank(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    for step in range(200):
        bound = 0.05 + 1e-9 * step
        update, assignment = answered({"q": start}, {"q": LowRank(start.b + 5, start.a)})
        found, _ = clipped(update, assignment, bound)
        length = increment(start, found.adapter["q"])
        assert bound - 1e-6 <= length <= bound


def test_an_a_that_was_not_trained_stays_in_the_dtype_that_came():
    start = LowRank(torch.zeros(1, 1), torch.tensor([[1 + 2**-8]]))  # Half way between bfloat16s.
    came = LowRank(torch.ones(1, 1), start.a).to(dtype=torch.bfloat16)
    update, assignment = answered({"q": start}, {"q": came})
    found, factor = clipped(update, assignment, 0.25)
    assert factor < 1
    assert found.adapter["q"].a is came.a


def test_the_same_update_is_shortened_the_same_again():
    rng = torch.Generator().manual_seed(3)
    start = LowRank(torch.randn(9, 3, generator=rng), torch.randn(3, 8, generator=rng))
    update, assignment = answered({"q": start}, {"q": LowRank(start.b - 1, start.a + 2)})
    first, c = clipped(update, assignment, 0.7)
    again, d = clipped(replace(update), assignment, 0.7)
    assert c == d
    assert first.adapter.hash() == again.adapter.hash()
    alone = clip.shortened(start, update.adapter["q"], c)
    assert torch.equal(alone.b, first.adapter["q"].b), "a site alone is what it is in the whole"
