"""FedIT: the mean of the factors, and its limits."""

import pytest
import torch

from aggregation_rounds import (
    SITE,
    Client,
    distance,
    fleet,
    fresh_state,
    no_training,
    noisy_training,
    play,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FedIT, FleetSpec
from polyrank.algebra import LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError

SHAPE = (14, 11)


def test_it_is_the_mean_of_b_times_the_mean_of_a():
    rule, clients = FedIT(), fleet([4, 4, 4], weights=[0.5, 0.2, 0.3])
    before = widened(fresh_state(rule, SHAPE, clients))
    training = noisy_training(0)
    after, report = play(rule, before, clients, training)
    results = [
        training(i, rule.assign_site(before, SITE, 4, c.scale, 0)) for i, c in enumerate(clients)
    ]
    b = sum(c.weight * one.b for c, one in zip(clients, results, strict=True))
    a = sum(c.weight * one.a for c, one in zip(clients, results, strict=True))
    assert distance(product(rule, after), b @ a) < 1e-12
    assert report.energy == pytest.approx(float((b @ a).square().sum()))
    assert report.discarded == 0.0
    # … and differs from the mean of the products by Σ w (B − B̄)(A − Ā), as documented.
    d = sum(c.weight * one.dense() for c, one in zip(clients, results, strict=True))
    error = sum(
        c.weight * (one.b - b) @ (one.a - a) for c, one in zip(clients, results, strict=True)
    )
    torch.testing.assert_close(d - b @ a, error)
    assert error.norm() > 0.1 * d.norm()


def test_all_clients_start_from_the_same_factors_which_are_the_state():
    rule, clients = FedIT(), fleet([4, 4])
    state = fresh_state(rule, SHAPE, clients)
    one, two = (rule.assign_site(state, SITE, 4, 4.0, seed).start for seed in (0, 1))
    assert torch.equal(one.a, two.a)
    assert not one.b.any()
    assert one.a.abs().max() <= 11**-0.5
    state, _ = play(rule, state, clients, noisy_training(0))
    assert torch.equal(rule.assign_site(state, SITE, 4, 4.0, 9).start.a, state.tensors[f"{SITE}/a"])


def test_a_round_without_training_is_a_fixed_point():
    rule, clients = FedIT(), fleet([4, 4, 4])
    state, _ = play(rule, fresh_state(rule, SHAPE, clients), clients, noisy_training(0))
    again, _ = play(rule, state, clients, no_training)
    for name, tensor in state.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-6, atol=0)


def test_it_depends_on_the_gauge():
    rule, clients = FedIT(), fleet([4, 4])
    state = widened(fresh_state(rule, SHAPE, clients))
    plain = noisy_training(0)

    def turned(i, assigned):
        result = plain(i, assigned)
        g = torch.eye(4, dtype=torch.float64) * (2.0 if i == 1 else 1.0)
        return LowRank(result.b @ g, torch.linalg.solve(g, result.a))

    one, _ = play(rule, state, clients, plain)
    two, _ = play(rule, state, clients, turned)
    assert distance(product(rule, two), product(rule, one)) > 0.05


def test_mixed_ranks_are_refused_before_the_run_by_site_and_client():
    spec = FleetSpec({SITE: SHAPE}, {"ada": {SITE: 4}, "bob": {SITE: 8}}, {SITE: 8}, seed=0)
    with pytest.raises(RuleError, match=rf"'{SITE}' client 'ada' has rank 4 and client 'bob' has"):
        FedIT().init(spec)
    with pytest.raises(RuleError, match="the server has rank 8"):
        FedIT().init(FleetSpec({SITE: SHAPE}, {"ada": {SITE: 4}}, {SITE: 8}, seed=0))


def test_ranks_may_differ_between_sites():
    shapes = {"q": (14, 11), "up": (30, 11)}
    ranks = {"q": 2, "up": 8}
    state = FedIT().init(FleetSpec(shapes, {"ada": ranks, "bob": ranks}, ranks, seed=0))
    assert FedIT().adapter(state).ranks == ranks


def test_another_rank_at_dealing_or_merging_is_refused():
    rule, clients = FedIT(), fleet([4, 4])
    state = fresh_state(rule, SHAPE, clients)
    with pytest.raises(RuleError, match="rank 2"):
        rule.assign_site(state, SITE, 2, 1.0, 0)
    with pytest.raises(RankError):
        rule.assign_site(state, SITE, 0, 1.0, 0)
    with pytest.raises(SiteError, match="'other'"):
        rule.assign_site(state, "other", 4, 1.0, 0)
    one = LowRank(torch.ones(14, 1), torch.ones(1, 11))
    assigned = rule.assign_site(state, SITE, 4, 1.0, 0)
    with pytest.raises(UpdateError, match="nothing is broadcast"):
        rule.merge_site(state, SITE, iter([Contribution(1.0, assigned, one)]))


def test_updates_that_are_not_finite_and_weights_that_are_no_shares_are_refused():
    rule, clients = FedIT(), fleet([4, 4])
    state = fresh_state(rule, SHAPE, clients)

    def exploded(i, assigned):
        return LowRank(assigned.start.b + float("nan"), assigned.start.a)

    with pytest.raises(UpdateError, match=SITE):
        play(rule, state, clients, exploded)
    with pytest.raises(RuleError, match="sum to"):
        play(rule, state, [Client(4, 1.0, 0.4)], no_training)


def test_adapter_is_the_product_with_factors_ordered_by_singular_value():
    rule, clients = FedIT(), fleet([4, 4])
    state = fresh_state(rule, SHAPE, clients)
    assert rule.adapter(state).norm() == 0.0
    assert rule.adapter(state).ranks == {SITE: 4}
    state, _ = play(rule, state, clients, noisy_training(0))
    exact = state.tensors[f"{SITE}/b"] @ state.tensors[f"{SITE}/a"]
    adapter = rule.adapter(state)[SITE]
    assert distance(adapter.dense(), exact) < 1e-12
    expected = torch.linalg.svdvals(exact)[:4]
    torch.testing.assert_close(adapter.b.norm(dim=0), expected)
