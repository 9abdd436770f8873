"""FlexLoRA: what it assigns, what it merges, what it refuses."""

import math

import pytest
import torch

from aggregation_rounds import (
    SITE,
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
from polyrank.aggregation import Contribution, FleetSpec, FlexLoRA, SiteAssignment, State, assign
from polyrank.algebra import LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError

MODES = ["replace", "delta", "tail-in-base"]
SPLITS = ["left", "balanced"]
RANKS = [1, 2, 4, 8]


def trained(rule: FlexLoRA, shape=(14, 11), rounds: int = 1) -> State:
    """Return a float64 state after rounds of planted training under mixed ranks."""
    clients = fleet(RANKS)
    state = widened(fresh_state(rule, shape, clients))
    for t in range(rounds):
        state, _ = play(rule, state, clients, noisy_training(t), seed=t)
    return state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_round_zero_deals_no_update_and_a_random_a_shared_by_all_ranks(mode, split):
    rule = FlexLoRA(mode, split)
    state = fresh_state(rule, (14, 11), fleet(RANKS))
    large = rule.assign_site(state, SITE, 8, 2.0, seed=5)
    small = rule.assign_site(state, SITE, 2, 8.0, seed=5)
    assert large.frozen is None
    assert not large.start.b.any()
    assert torch.equal(small.start.a, large.start.a[:2])
    assert large.start.a.abs().max() <= 1 / math.sqrt(11)
    assert large.start.a.std() == pytest.approx(1 / math.sqrt(33), rel=0.2)
    other = rule.assign_site(state, SITE, 8, 2.0, seed=6)
    assert not torch.equal(other.start.a, large.start.a)


def test_fresh_rows_differ_from_site_to_site():
    shapes = {"q": (14, 11), "k": (14, 11)}
    state = FlexLoRA().init(FleetSpec(shapes, {}, dict.fromkeys(shapes, 4), seed=0))
    q, k = (FlexLoRA().assign_site(state, site, 4, 1.0, seed=5).start.a for site in shapes)
    assert not torch.equal(q, k)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale", [0.25, 1.0, 16.0])
def test_every_client_starts_from_the_best_approximation_of_its_rank(mode, split, scale):
    rule = FlexLoRA(mode, split)
    state = trained(rule)
    d = product(rule, state)
    for rank in RANKS:
        assigned = rule.assign_site(state, SITE, rank, scale, seed=0)
        assert assigned.start.rank == rank
        assert distance(assigned.start.dense(), best(d, rank)) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_left_and_balanced_deal_the_same_products_in_their_own_factors(mode):
    left, balanced = FlexLoRA(mode, "left"), FlexLoRA(mode, "balanced")
    state = trained(left)
    scale = 4.0
    for rank in RANKS:
        one = left.assign_site(state, SITE, rank, scale, 0).start
        two = balanced.assign_site(state, SITE, rank, scale, 0).start
        torch.testing.assert_close(one.dense(), two.dense())
        s = state.tensors[f"{SITE}/s"][:rank]
        # What training holds: B divided by its scale. Both factors carry √(σ/s), or B all of σ/s.
        torch.testing.assert_close((two.b / scale).norm(dim=0), (s / scale).sqrt())
        torch.testing.assert_close(two.a.norm(dim=1), (s / scale).sqrt())
        torch.testing.assert_close((one.b / scale).norm(dim=0), s / scale)
        torch.testing.assert_close(one.a.norm(dim=1), torch.ones_like(s))


@pytest.mark.parametrize("split", SPLITS)
def test_smaller_ranks_are_prefixes_of_larger_ones_bit_by_bit(split):
    rule = FlexLoRA(split=split)
    state = trained(rule)
    large = rule.assign_site(state, SITE, 8, 2.0, 0).start
    for rank in RANKS:
        small = rule.assign_site(state, SITE, rank, 2.0, 0).start
        assert torch.equal(small.b, large.b[:, :rank])
        assert torch.equal(small.a, large.a[:rank])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_dead_directions_are_repaired_so_that_they_can_train(mode, split):
    rule = FlexLoRA(mode, split)
    d = LowRank(torch.randn(14, 3), torch.randn(3, 11)) + LowRank(
        1e-9 * torch.randn(14, 1), torch.randn(1, 11)
    )
    clients = fleet([8])
    state = fresh_state(rule, (14, 11), clients)
    state, _ = rule.merge_site(state, SITE, iter([Contribution(1.0, _assigned(4, 14, 11), d)]))
    start = rule.assign_site(state, SITE, 8, 2.0, seed=3).start
    b, a = (f.clone().requires_grad_() for f in (start.b, start.a))
    torch.nn.functional.linear(torch.randn(20, 11), b @ a).square().sum().backward()
    assert not start.b[:, 3:].any()
    assert (start.a[3:].norm(dim=1) > 0).all()
    loss = (torch.randn(20, 11) @ (b @ a).T - torch.randn(20, 14)).square().sum()
    b.grad = None
    loss.backward()
    assert (b.grad.norm(dim=0) > 0).all()
    again = rule.assign_site(state, SITE, 6, 4.0, seed=3).start
    assert torch.equal(again.a[3:], start.a[3:6])
    nothing_yet = fresh_state(rule, (14, 11), clients)
    first = rule.assign_site(nothing_yet, SITE, 8, 2.0, seed=3).start
    assert torch.equal(first.a[3:], start.a[3:]), "row j depends on seed, site and j alone"


def _assigned(rank: int, m: int, n: int) -> SiteAssignment:
    return SiteAssignment(LowRank(torch.zeros(m, rank), torch.ones(rank, n)))


@pytest.mark.parametrize("split", SPLITS)
def test_tail_in_base_lets_every_client_start_exactly_at_the_aggregate(split):
    rule = FlexLoRA("tail-in-base", split)
    state = trained(rule)
    d = product(rule, state)
    for rank in (1, 2, 4):
        assigned = rule.assign_site(state, SITE, rank, 3.0, 0)
        assert assigned.frozen is not None
        assert assigned.frozen.rank == 8 - rank
        assert distance(assigned.start.dense() + assigned.frozen.dense(), d) < 1e-12
    assert rule.assign_site(state, SITE, 8, 3.0, 0).frozen is None


def test_tail_in_base_acts_whole_where_a_client_trains_nothing():
    """So that it starts exactly at the aggregate at every site, not only at its own."""
    shapes = {"k": (6, 5), "q": (8, 7)}
    draw = torch.Generator().manual_seed(0)
    for rule in (FlexLoRA("tail-in-base"), FlexLoRA("delta")):
        state = rule.init(FleetSpec(shapes, {}, {"k": 3, "q": 4}, 0))
        u, s, vh = torch.linalg.svd(torch.randn(6, 5, generator=draw), full_matrices=False)
        held = {"k/u": u[:, :3], "k/s": s[:3], "k/v": vh[:3].T.contiguous()}
        state = state.update(held)
        got = assign(rule, state, {"q": 2}, {"q": 1.0}, 0)
        assert set(got.start) == {"q"}
        if rule.mode == "delta":
            assert not got.frozen
        else:
            whole = (u[:, :3] * s[:3]) @ vh[:3]
            assert set(got.frozen) == {"k"}, "at q there is nothing yet"
            assert torch.allclose(got.frozen["k"].dense(), whole, atol=1e-5)


def test_only_tail_in_base_sends_a_frozen_term():
    for mode in ("replace", "delta"):
        state = trained(FlexLoRA(mode))
        assert FlexLoRA(mode).assign_site(state, SITE, 2, 1.0, 0).frozen is None


def test_deal_gathers_sites_scales_and_the_frozen_terms():
    rule = FlexLoRA("tail-in-base")
    state = trained(rule)
    assignment = assign(rule, state, {SITE: 2}, {SITE: 8.0}, seed=1)
    assert assignment.ranks == {SITE: 2}
    assert assignment.scale == {SITE: 8.0}
    assert [*assignment.frozen] == [SITE]
    assert assignment.hash() != assign(rule, state, {SITE: 2}, {SITE: 4.0}, seed=1).hash()


def test_a_server_rank_below_a_clients_is_filled_up_with_fresh_directions():
    rule = FlexLoRA("delta")
    clients = fleet([2, 6])
    state = widened(fresh_state(rule, (14, 11), clients, server_rank=3))
    state, report = play(rule, state, clients, noisy_training(0))
    assert report.discarded > 0
    start = rule.assign_site(state, SITE, 6, 1.0, 0).start
    assert not start.b[:, 3:].any()
    assert (start.a[3:].norm(dim=1) > 0).all()


def test_replace_is_the_weighted_sum_of_full_size_updates():
    rule = FlexLoRA()
    clients = fleet([4, 1, 3], weights=[0.5, 0.2, 0.3])
    state = widened(fresh_state(rule, (14, 11), clients, server_rank=8))
    training = noisy_training(0)
    state, report = play(rule, state, clients, training)
    fresh = widened(fresh_state(rule, (14, 11), clients, server_rank=8))
    dense = sum(
        c.weight * training(i, rule.assign_site(fresh, SITE, c.rank, c.scale, 0)).dense()
        for i, c in enumerate(clients)
    )
    assert distance(product(rule, state), dense) < 1e-12
    assert report.energy == pytest.approx(float(dense.square().sum()))
    assert report.discarded == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_discarded_energy_is_what_the_servers_rank_cuts_off(mode):
    rule = FlexLoRA(mode)
    clients = fleet([4, 4, 4])
    wide = widened(fresh_state(rule, (14, 11), clients, server_rank=11))
    narrow = widened(fresh_state(rule, (14, 11), clients, server_rank=5))
    wide, _ = play(rule, wide, clients, noisy_training(0))
    narrow, report = play(rule, narrow, clients, noisy_training(0))
    d = product(rule, wide)
    assert distance(product(rule, narrow), best(d, 5)) < 1e-12
    assert report.discarded == pytest.approx(float((d - best(d, 5)).square().sum()), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_state_keeps_its_shapes_and_follows_the_dtype_of_contributions(mode):
    rule = FlexLoRA(mode)
    clients = fleet(RANKS)
    for dtype in (torch.float32, torch.float64):
        state = fresh_state(rule, (14, 11), clients)
        assert {name: tuple(t.shape) for name, t in state.tensors.items()} == {
            f"{SITE}/u": (14, 8),
            f"{SITE}/s": (8,),
            f"{SITE}/v": (11, 8),
        }
        shapes = {name: t.shape for name, t in state.tensors.items()}
        after, _ = play(rule, state, clients, noisy_training(0, dtype=dtype))
        assert {name: t.shape for name, t in after.tensors.items()} == shapes
        assert {t.dtype for t in after.tensors.values()} == {dtype}
        assert not any(t.any() for t in state.tensors.values()), "the old state was written to"


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_results_are_widened_before_they_are_weighted(mode):
    rule = FlexLoRA(mode)
    clients = fleet([4, 4, 4])
    state = fresh_state(rule, (14, 11), clients)
    half = noisy_training(0, dtype=torch.bfloat16)
    after, _ = play(rule, state, clients, half)
    exact = sum(
        c.weight
        * half(i, rule.assign_site(state, SITE, 4, c.scale, 0)).to(dtype=torch.float64).dense()
        for i, c in enumerate(clients)
    )
    assert {t.dtype for t in after.tensors.values()} == {torch.float32}
    assert distance(product(rule, after), best(exact, 4)) < 1e-5


def test_adapter_is_at_the_servers_rank_from_the_start():
    rule = FlexLoRA()
    before = rule.adapter(fresh_state(rule, (14, 11), fleet(RANKS)))
    after = rule.adapter(trained(rule))
    assert before.ranks == after.ranks == {SITE: 8}
    assert before.norm() == 0.0
    norms = after[SITE].b.norm(dim=0)
    assert (norms[1:] <= norms[:-1]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_by_site(mode, bad):
    rule = FlexLoRA(mode)
    clients = fleet(RANKS)

    def training(i, assigned):
        result = no_training(i, assigned)
        result.a[0, 0] = bad if i == 2 else 0.0
        return result

    with pytest.raises(UpdateError, match=rf"contribution 2 at '{SITE}'"):
        play(rule, fresh_state(rule, (14, 11), clients), clients, training)


@pytest.mark.parametrize("mode", MODES)
def test_an_update_of_another_rank_or_shape_is_refused_and_never_broadcast(mode):
    rule = FlexLoRA(mode)
    clients = fleet([4, 4])
    state = fresh_state(rule, (14, 11), clients)
    for wrong in [(14, 1, 11), (14, 3, 11), (1, 4, 11), (14, 4, 1), (11, 4, 14)]:
        m, r, n = wrong
        update = LowRank(torch.ones(m, r), torch.ones(r, n))
        with pytest.raises(UpdateError, match=SITE):
            play(rule, state, clients, lambda i, assigned, update=update: update)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "weights", [[0.5, -0.5], [float("nan"), 1.0], [0.0, 0.0], [0.5, 0.4], [1.0, 1.0], []]
)
def test_weights_that_are_no_shares_are_refused(mode, weights):
    rule = FlexLoRA(mode)
    state = fresh_state(rule, (14, 11), fleet([4, 4]))
    assigned = rule.assign_site(state, SITE, 4, 1.0, 0)
    given = iter([Contribution(w, assigned, assigned.start) for w in weights])
    with pytest.raises(RuleError):
        rule.merge_site(state, SITE, given)


def test_ranks_and_sites_that_do_not_fit_are_refused_before_the_run():
    rule = FlexLoRA()
    shapes = {SITE: (14, 11)}
    for rank in (0, -1, 12):
        with pytest.raises(RankError, match=r"1…11"):
            rule.init(FleetSpec(shapes, {"ada": {SITE: rank}}, {SITE: 8}, 0))
        with pytest.raises(RankError, match=r"1…11"):
            rule.init(FleetSpec(shapes, {"ada": {SITE: 8}}, {SITE: rank}, 0))
        with pytest.raises(RankError, match=r"1…11"):
            rule.assign_site(trained(rule), SITE, rank, 1.0, 0)
    with pytest.raises(SiteError, match=r"'ada'.*'other'"):
        rule.init(FleetSpec(shapes, {"ada": {"other": 8}}, {SITE: 8}, 0))
    with pytest.raises(SiteError, match="no server rank"):
        rule.init(FleetSpec(shapes, {"ada": {SITE: 8}}, {}, 0))
    with pytest.raises(SiteError, match="'other'"):
        rule.assign_site(trained(rule), "other", 1, 1.0, 0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_cannot_be_divided_by_is_refused(scale):
    with pytest.raises(RuleError, match="scale"):
        FlexLoRA().assign_site(trained(FlexLoRA()), SITE, 2, scale, 0)


def test_contributions_are_read_lazily_and_not_kept():
    rule = FlexLoRA("delta")
    clients = fleet([4] * 120)
    state = fresh_state(rule, (24, 20), clients)
    state, _ = play(rule, state, fleet([4]), noisy_training(0, dtype=torch.float32))
    alive = 0
    most = 0

    class Counted(LowRank):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def contributions():
        nonlocal alive, most
        for i, client in enumerate(clients):
            assigned = rule.assign_site(state, SITE, 4, client.scale, 0)
            result = noisy_training(i, dtype=torch.float32)(i, assigned)
            alive += 1
            most = max(most, alive)
            yield Contribution(client.weight, assigned, Counted(result.b, result.a))

    rule.merge_site(state, SITE, contributions())
    assert most <= 70, "more than one batch of 256 columns was held at once"
