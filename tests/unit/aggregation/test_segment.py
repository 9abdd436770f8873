"""Segment-wise averaging: every column over those who hold it."""

import pytest
import torch

from aggregation_rounds import (
    SITE,
    distance,
    fleet,
    fresh_state,
    no_training,
    noisy_training,
    play,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FedIT, FleetSpec, Segment
from polyrank.algebra import LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError

SHAPE = (14, 11)
RANKS = [1, 2, 4, 8]
RULE = Segment()


def test_every_column_is_the_weighted_mean_of_those_who_hold_it():
    clients = fleet(RANKS, weights=[0.4, 0.3, 0.2, 0.1])
    before = widened(fresh_state(RULE, SHAPE, clients))
    training = noisy_training(1)
    after, report = play(RULE, before, clients, training)
    results = [
        training(i, RULE.assign_site(before, SITE, c.rank, c.scale, 0))
        for i, c in enumerate(clients)
    ]
    for j in range(8):
        having = [(c.weight, one) for c, one in zip(clients, results, strict=True) if c.rank > j]
        total = sum(w for w, _ in having)
        b = sum(w * one.b[:, j] for w, one in having) / total
        a = sum(w * one.a[j] for w, one in having) / total
        assert distance(after.tensors[f"{SITE}/b"][:, j], b) < 1e-12
        assert distance(after.tensors[f"{SITE}/a"][j], a) < 1e-12
    d = after.tensors[f"{SITE}/b"] @ after.tensors[f"{SITE}/a"]
    assert distance(product(RULE, after), d) < 1e-12
    assert report.energy == pytest.approx(float(d.square().sum()))


def test_columns_that_no_client_of_the_round_holds_stay_bit_by_bit():
    clients = fleet(RANKS)
    state, _ = play(RULE, fresh_state(RULE, SHAPE, clients), clients, noisy_training(0))
    after, _ = play(RULE, state, fleet([1, 2]), noisy_training(1))
    b, a = (state.tensors[f"{SITE}/{what}"] for what in "ba")
    assert torch.equal(after.tensors[f"{SITE}/b"][:, 2:], b[:, 2:])
    assert torch.equal(after.tensors[f"{SITE}/a"][2:], a[2:])
    assert not torch.equal(after.tensors[f"{SITE}/b"][:, :2], b[:, :2])


def test_with_equal_ranks_it_is_fedit():
    clients, fedit = fleet([4, 4, 4], weights=[0.5, 0.2, 0.3]), FedIT()
    one = two = widened(fresh_state(fedit, SHAPE, clients))
    for t in range(3):
        one, _ = play(RULE, one, clients, noisy_training(t))
        two, _ = play(fedit, two, clients, noisy_training(t))
        assert distance(product(RULE, one), product(fedit, two)) < 1e-12


def test_mixed_ranks_dilute_nothing():
    clients = fleet(RANKS)
    state, _ = play(RULE, widened(fresh_state(RULE, SHAPE, clients)), clients, noisy_training(0))
    d = product(RULE, state)
    for _ in range(5):
        state, _ = play(RULE, state, clients, no_training)
    assert distance(product(RULE, state), d) < 1e-12


def test_it_depends_on_the_order_of_columns():
    clients = fleet([2, 4])
    state = widened(fresh_state(RULE, SHAPE, clients))
    plain = noisy_training(0)

    def turned(i, assigned):
        result = plain(i, assigned)
        return LowRank(result.b.flip(1), result.a.flip(0)) if i == 1 else result

    one, _ = play(RULE, state, clients, plain)
    two, _ = play(RULE, state, clients, turned)
    assert distance(product(RULE, two), product(RULE, one)) > 0.05


def test_clients_get_the_first_columns_and_rows_and_all_start_alike():
    state = fresh_state(RULE, SHAPE, fleet(RANKS))
    one = RULE.assign_site(state, SITE, 8, 1.0, seed=0).start
    two = RULE.assign_site(state, SITE, 3, 4.0, seed=1).start
    assert torch.equal(one.a[:3], two.a)
    assert not one.b.any()
    assert 0 < float(one.a.abs().max()) <= 11**-0.5


def test_what_cannot_be_served_is_refused_by_name():
    spec = FleetSpec({SITE: SHAPE}, {"ada": {SITE: 8}}, {SITE: 4}, seed=0)
    with pytest.raises(RankError, match=r"client 'ada' at .* has rank 8, the server keeps 4"):
        RULE.init(spec)
    state = fresh_state(RULE, SHAPE, fleet([4]))
    with pytest.raises(RankError, match="server keeps 4"):
        RULE.assign_site(state, SITE, 5, 1.0, 0)
    with pytest.raises(RuleError, match="scale"):
        RULE.assign_site(state, SITE, 4, 0.0, 0)
    with pytest.raises(SiteError, match="'other'"):
        RULE.assign_site(state, "other", 4, 1.0, 0)
    wide = fresh_state(RULE, SHAPE, fleet([8]))
    assigned = RULE.assign_site(wide, SITE, 8, 1.0, 0)
    with pytest.raises(UpdateError, match="rank 8, the server keeps 4"):
        RULE.merge_site(state, SITE, iter([Contribution(1.0, assigned, assigned.start)]))
