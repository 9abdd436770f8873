"""HetLoRA: padding, weights by norm, and clients that give up ranks."""

import json

import pytest
import torch

from aggregation_rounds import (
    SITE,
    distance,
    fleet,
    fresh_state,
    no_training,
    noisy_training,
    padded,
    play,
    play_round,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FedIT, FleetSpec, HetLoRA, State, assign
from polyrank.algebra import LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError

SHAPE = (14, 11)
RANKS = [1, 2, 4, 8]


def started(rule, clients, seed=0):
    """Return a float64 state after one round of planted training."""
    state = widened(fresh_state(rule, SHAPE, clients))
    return play_round(rule, state, clients, noisy_training(seed))[0]


def with_tail(before, factor, keep):
    """Return the factors with the columns of B behind `keep` multiplied by `factor`."""
    b = before.b.clone()
    b[:, keep:] *= factor
    return LowRank(b, before.a)


def test_factors_are_padded_and_averaged_by_the_norms_of_the_updates():
    rule, clients = HetLoRA(gamma=1.0), fleet(RANKS, weights=[0.7, 0.1, 0.1, 0.1])
    before = started(rule, clients)
    training = noisy_training(1)
    after, report = play_round(rule, before, clients, training)
    results = [
        training(i, rule.assign_site(before, SITE, c.rank, c.scale, 0))
        for i, c in enumerate(clients)
    ]
    norms = [float(one.dense().norm()) for one in results]
    b = sum(n / sum(norms) * padded(one, 8).b for n, one in zip(norms, results, strict=True))
    a = sum(n / sum(norms) * padded(one, 8).a for n, one in zip(norms, results, strict=True))
    assert distance(after.tensors[f"{SITE}/b"], b) < 1e-12
    assert distance(after.tensors[f"{SITE}/a"], a) < 1e-12
    assert distance(product(rule, after), b @ a) < 1e-12
    assert report.energy == pytest.approx(float((b @ a).square().sum()))
    assert report.discarded == 0.0


def test_weights_are_norms_over_the_whole_adapter_and_equal_if_nothing_moved():
    rule, state = HetLoRA(), State({})
    norms = {"ada": 3.0, "bob": 1.0}
    assert rule.weigh(state, {"ada": 1.0, "bob": 99.0}, norms.__getitem__) == norms
    assert rule.weigh(state, {"ada": 1.0, "bob": 99.0}, lambda _: 0.0) == {"ada": 1.0, "bob": 1.0}
    norms["bob"] = 0.0
    found = rule.weigh(state, {"ada": 1.0, "bob": 99.0}, norms.__getitem__)
    assert found["ada"] == 3.0
    assert 0 < found["bob"] < 1e-11, "it may be alone at a site, where weights must not be all zero"


def test_with_equal_ranks_and_weights_and_no_pruning_it_is_fedit():
    clients = fleet([4, 4, 4])
    het, fedit = HetLoRA(gamma=1.0), FedIT()
    one = two = widened(fresh_state(fedit, SHAPE, clients))
    for t in range(3):
        one, _ = play(het, one, clients, noisy_training(t))
        two, _ = play(fedit, two, clients, noisy_training(t))
        assert distance(product(het, one), product(fedit, two)) < 1e-12


def test_idle_rounds_dilute_both_factors_of_what_only_some_hold():
    rule, clients = HetLoRA(gamma=1.0), fleet(RANKS)
    state = started(rule, clients)
    b, a = (state.tensors[f"{SITE}/{what}"] for what in "ba")
    after, _ = play(rule, state, clients, no_training)
    c = torch.tensor([sum(r > j for r in RANKS) / 4 for j in range(8)]).double()
    assert distance(product(rule, after), (b * c**2) @ a) < 1e-12


def test_clients_get_the_first_columns_and_rows_bit_by_bit():
    rule, clients = HetLoRA(), fleet(RANKS)
    state = started(rule, clients)
    for rank in RANKS:
        start = rule.assign_site(state, SITE, rank, 2.0, seed=3).start
        assert torch.equal(start.b, state.tensors[f"{SITE}/b"][:, :rank])
        assert torch.equal(start.a, state.tensors[f"{SITE}/a"][:rank])


def test_a_column_that_died_is_sent_with_a_fresh_row_shared_by_all():
    rule = HetLoRA()
    state = fresh_state(rule, SHAPE, fleet([2, 2]), server_rank=6)
    first = rule.assign_site(state, SITE, 6, 1.0, seed=3).start
    assert torch.equal(first.a, state.tensors[f"{SITE}/a"])  # round 0: nothing died yet
    state, _ = play(rule, state, fleet([2, 2]), noisy_training(0))
    assert not state.tensors[f"{SITE}/a"][2:].any()
    large, small = (rule.assign_site(state, SITE, r, 1.0, seed=3).start for r in (6, 4))
    assert (large.a.norm(dim=1) > 0).all()
    assert not large.b[:, 2:].any()
    assert torch.equal(large.a[:4], small.a)
    assert torch.equal(large.a[:2], state.tensors[f"{SITE}/a"][:2])
    other = rule.assign_site(state, SITE, 6, 1.0, seed=4).start
    assert not torch.equal(other.a, large.a)


@pytest.mark.parametrize(
    ("gamma", "rank", "keep"),
    [(0.99, 1, 1), (0.99, 4, 3), (0.99, 100, 99), (0.5, 8, 4), (0.3, 2, 1), (0.29, 100, 29)],
)
def test_the_penalty_is_on_what_a_rank_would_lose(gamma, rank, keep):
    rule = HetLoRA(gamma, penalty=0.25)
    state = fresh_state(rule, (120, 110), fleet([rank]))
    assert rule.assign_site(state, SITE, rank, 1.0, 0).penalty == (0.25, keep)


def test_without_pruning_or_strength_there_is_no_penalty():
    for rule in (HetLoRA(gamma=1.0), HetLoRA(penalty=0.0)):
        state = fresh_state(rule, SHAPE, fleet([4]))
        assert rule.assign_site(state, SITE, 4, 1.0, 0).penalty is None
    assignment = assign(HetLoRA(0.5, 0.1), state, {SITE: 4}, {SITE: 1.0}, 0)
    assert assignment.penalty.strength == 0.1
    assert assignment.penalty.keep == {SITE: 2}


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 2), (1 - 1e-9, 2), (1.0, 4), (2.0, 4)], ids=str)
def test_a_rank_is_given_up_where_the_product_of_the_tail_fell(factor, rank):
    rule, clients = HetLoRA(gamma=0.5), fleet([4, 4])
    state = started(rule, clients)

    def training(i, assigned):
        return with_tail(assigned.start, factor, keep=2) if i == 0 else no_training(i, assigned)

    after, _ = play_round(rule, state, clients, training)
    assert rule.ranks(after, "0", {SITE: 4, "other": 4}) == {SITE: rank, "other": 4}
    assert rule.ranks(after, "0", {SITE: 1}) == {SITE: 1}  # what it can afford today
    assert rule.ranks(after, "1", {SITE: 4}) == {SITE: 4}
    assert rule.ranks(state, "0", {SITE: 4}) == {SITE: 4}  # the state before is as it was


def test_a_tail_that_was_zero_as_sent_is_kept_for_growing():
    rule, clients = HetLoRA(gamma=0.5), fleet([4])
    state = fresh_state(rule, SHAPE, clients)
    state, _ = play_round(rule, state, clients, no_training)  # B = 0
    assert rule.ranks(state, "0", {SITE: 4}) == {SITE: 4}


def test_the_tail_that_a_client_gave_up_is_not_aggregated_and_stays_given_up():
    rule, clients = HetLoRA(gamma=0.5), fleet([4, 4])
    state = started(rule, clients)

    def training(i, assigned):
        return with_tail(assigned.start, 0.5, keep=2) if i == 0 else no_training(i, assigned)

    after, _ = play(rule, state, clients, training)  # equal weights
    b = state.tensors[f"{SITE}/b"].clone()
    b[:, 2:] *= 0.5  # the other client's half alone
    assert distance(after.tensors[f"{SITE}/b"], b) < 1e-12
    # Next round it is sent 2, and halving again ends at 1, from where nothing is left to give up.
    for expected in (1, 1):
        after, _ = play_round(
            rule,
            after,
            clients,
            lambda _, assigned: with_tail(assigned.start, 0.5, assigned.start.rank // 2),
        )
        assert rule.ranks(after, "0", {SITE: 4}) == {SITE: expected}
    assert json.loads(json.dumps(after.scalars)) == after.scalars
    assert after.scalars[f"{SITE}/pruned"]["0"] == 1


def test_what_cannot_be_served_is_refused_by_name():
    spec = FleetSpec({SITE: SHAPE}, {"ada": {SITE: 8}}, {SITE: 4}, seed=0)
    with pytest.raises(RankError, match=r"client 'ada' at .* has rank 8, the server keeps 4"):
        HetLoRA().init(spec)
    state = fresh_state(HetLoRA(), SHAPE, fleet([4]))
    with pytest.raises(RankError, match="server keeps 4"):
        HetLoRA().assign_site(state, SITE, 5, 1.0, 0)
    with pytest.raises(SiteError, match="'other'"):
        HetLoRA().assign_site(state, "other", 4, 1.0, 0)
    assigned = HetLoRA().assign_site(state, SITE, 4, 1.0, 0)
    narrow = LowRank(torch.ones(14, 1), torch.ones(1, 11))
    with pytest.raises(UpdateError, match="nothing is broadcast"):
        HetLoRA().merge_site(state, SITE, iter([Contribution(1.0, assigned, narrow)]))
    for gamma in (0.0, 1.1, float("nan")):
        with pytest.raises(RuleError, match="gamma"):
            HetLoRA(gamma=gamma)
    for penalty in (-1.0, float("inf")):
        with pytest.raises(RuleError, match="penalty"):
            HetLoRA(penalty=penalty)
