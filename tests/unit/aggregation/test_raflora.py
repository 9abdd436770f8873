"""raFLoRA: every direction averaged over the clients that hold it, in product space."""

import pytest
import torch

from aggregation_rounds import (
    SITE,
    Client,
    best,
    distance,
    fleet,
    fresh_state,
    no_training,
    noisy_training,
    play,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FlexLoRA, SiteAssignment
from polyrank.aggregation.raflora import RaFLoRA
from polyrank.algebra import LowRank
from polyrank.errors import RuleError

SHAPE = (14, 11)
RANKS = [1, 2, 4, 8]
RULE = RaFLoRA()
f64 = {"dtype": torch.float64}


def test_by_hand_with_two_clients_of_rank_one_and_two():
    """w = ¾, ¼, so c_1 = 1 and c_2 = ¼: D = ¾·b_11 a_11ᵀ + ¼·b_21 a_21ᵀ + b_22 a_22ᵀ."""
    one = LowRank(torch.tensor([[4.0], [0.0]], **f64), torch.tensor([[1.0, 0.0]], **f64))
    two = LowRank(
        torch.tensor([[8.0, 0.0], [0.0, 6.0]], **f64), torch.tensor([[1.0, 0.0], [0.0, 1.0]], **f64)
    )
    state = widened(fresh_state(RULE, (2, 2), [Client(1, 1.0, 0.75), Client(2, 1.0, 0.25)]))
    sent = [RULE.assign_site(state, SITE, rank, 1.0, 0) for rank in (1, 2)]
    parts = [Contribution(0.75, sent[0], one, "a"), Contribution(0.25, sent[1], two, "b")]
    after, report = RULE.merge_site(state, SITE, iter(parts))
    expected = torch.tensor([[0.75 * 4 + 0.25 * 8, 0.0], [0.0, 6.0]], **f64)
    torch.testing.assert_close(product(RULE, after), expected)
    assert report.energy == pytest.approx(5.0**2 + 6.0**2)
    replaced, _ = FlexLoRA().merge_site(state, SITE, iter(parts))
    assert product(FlexLoRA(), replaced)[1, 1] == pytest.approx(0.25 * 6)


@pytest.mark.parametrize("factorisation", ["auto", "gram", "qr", "dense"])
@pytest.mark.parametrize("weights", [[0.4, 0.3, 0.2, 0.1], [0.1, 0.0, 0.3, 0.6]])
def test_it_is_the_sum_of_dense_columns_over_the_weight_of_those_who_hold_them(
    weights, factorisation
):
    """Rounds of planted training beside dense matrices and a dense SVD in float64."""
    rule, clients = RaFLoRA(factorisation=factorisation), fleet(RANKS, weights=weights)
    state = widened(fresh_state(rule, SHAPE, clients, server_rank=6))
    for t in range(3):
        training = noisy_training(t)
        results = [
            training(i, rule.assign_site(state, SITE, c.rank, c.scale, t))
            for i, c in enumerate(clients)
        ]
        expected = torch.zeros(SHAPE, **f64)
        for j in range(max(RANKS)):
            having = [(c.weight, x) for c, x in zip(clients, results, strict=True) if c.rank > j]
            c_j = sum(weight for weight, _ in having)
            for weight, x in having:
                expected += weight / c_j * torch.outer(x.b[:, j], x.a[j])
        state, report = play(rule, state, clients, training, seed=t)
        assert distance(product(rule, state), best(expected, 6)) < 1e-9
        assert report.energy == pytest.approx(float(expected.square().sum()), rel=1e-9)
        lost = float((expected - best(expected, 6)).square().sum())
        assert report.discarded == pytest.approx(lost, rel=1e-6)


def test_directions_that_no_client_of_the_round_holds_stay():
    clients = fleet(RANKS)
    state, _ = play(RULE, widened(fresh_state(RULE, SHAPE, clients)), clients, noisy_training(0))
    d = product(RULE, state)
    idle, _ = play(RULE, state, fleet([1, 2]), no_training)
    assert distance(product(RULE, idle), d) < 1e-12
    weak = fleet([2, 2])
    moved, _ = play(RULE, state, weak, noisy_training(1))
    starts = [RULE.assign_site(state, SITE, 2, c.scale, 0) for c in weak]
    results = [noisy_training(1)(i, start).dense() for i, start in enumerate(starts)]
    expected = sum(results) / 2 + d - best(d, 2)
    assert distance(product(RULE, moved), best(expected, 8)) < 1e-9


def test_with_equal_ranks_it_is_flexlora_and_with_mixed_ones_its_tail_does_not_shrink():
    equal, mixed = fleet([4, 4, 4], weights=[0.5, 0.2, 0.3]), fleet(RANKS)
    for clients, same in ((equal, True), (mixed, False)):
        state = widened(fresh_state(RULE, SHAPE, clients))
        state, _ = play(RULE, state, clients, noisy_training(0))
        ours, _ = play(RULE, state, clients, noisy_training(1))
        theirs, _ = play(FlexLoRA(), state, clients, noisy_training(1))
        assert (distance(product(RULE, ours), product(RULE, theirs)) < 1e-9) == same
        ours, theirs = state, state
        for t in range(5):
            ours, _ = play(RULE, ours, clients, no_training, seed=t)
            theirs, _ = play(FlexLoRA(), theirs, clients, no_training, seed=t)
        assert distance(product(RULE, ours), product(RULE, state)) < 1e-9
        assert (distance(product(RULE, theirs), product(RULE, state)) < 1e-9) == same


def test_it_depends_on_the_gauge_where_ranks_differ_and_only_there():
    """The same products in turned columns: another D, unlike with increments."""
    turn = torch.linalg.qr(torch.randn(4, 4, **f64, generator=torch.Generator().manual_seed(0))).Q

    def turned(i: int, assigned: SiteAssignment) -> LowRank:
        x = noisy_training(3)(i, assigned)
        return LowRank(x.b @ turn, turn.T @ x.a) if x.rank == 4 else x

    for ranks, moves in (([2, 4], True), ([4, 4], False)):
        clients = fleet(ranks)
        state = widened(fresh_state(RULE, SHAPE, clients))
        state, _ = play(RULE, state, clients, noisy_training(0))
        for rule, depends in ((RULE, moves), (FlexLoRA("delta"), False)):
            plain, _ = play(rule, state, clients, noisy_training(3))
            other, _ = play(rule, state, clients, turned)
            change = distance(product(rule, other), product(rule, plain))
            assert change > 1e-2 if depends else change < 1e-9


def test_unknown_options_are_refused():
    with pytest.raises(RuleError, match=r"raflora split 'balance'.*did you mean 'balanced'"):
        RaFLoRA(split="balance")
    with pytest.raises(RuleError, match="raflora factorisation 'svd'"):
        RaFLoRA(factorisation="svd")
