"""The server's mathematics over fleets: fixed points, gauge, permutation, splitting, scale.

Everything runs in float64 unless a dtype is the point, so tolerances are 1e-9 or smaller.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aggregation_rounds import (
    SITE,
    Client,
    best,
    distance,
    fleet,
    fleets,
    fresh_state,
    no_training,
    noisy_training,
    play,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FedIT, FlexLoRA, SiteAssignment
from polyrank.algebra import LowRank

MODES = ["replace", "delta", "tail-in-base"]
SPLITS = ["left", "balanced"]
SHAPE = (13, 10)

relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[*HealthCheck])


rules = st.builds(FlexLoRA, st.sampled_from(MODES), st.sampled_from(SPLITS))


def full_rank_start(rule, rank, seed=0):
    """Return a float64 state whose D has `rank` well separated singular values."""
    clients = fleet([rank])
    state = widened(fresh_state(rule, SHAPE, clients))
    draw = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, rank, generator=draw, dtype=torch.float64)).Q
        for size in SHAPE
    )
    s = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    planted = LowRank(u * s, v.T)
    return play(rule, state, clients, lambda *_: planted)[0]


@given(rules.filter(lambda r: r.mode != "replace"), fleets())
@relaxed
def test_rounds_without_training_are_fixed_points_of_delta_and_tail_in_base(rule, clients):
    server = max(c.rank for c in clients)
    state = full_rank_start(rule, server)
    d = product(rule, state)
    for t in range(5):
        state, report = play(rule, state, clients, no_training, seed=t)
        assert distance(product(rule, state), d) < 1e-12
        assert report.discarded <= 1e-20 * report.energy


@given(st.sampled_from(SPLITS), fleets())
@relaxed
def test_replace_shrinks_each_direction_by_the_weight_of_those_who_hold_it(split, clients):
    rule = FlexLoRA("replace", split)
    server = max(c.rank for c in clients)
    state = full_rank_start(rule, server)
    before = product(rule, state)
    u, s, v = (state.tensors[f"{SITE}/{what}"] for what in "usv")
    c = torch.tensor(
        [sum(one.weight for one in clients if one.rank > j) for j in range(server)]
    ).double()
    assume(float((s * c**4).min() / s[0]) > 1e-5)  # still above what counts as dead
    for t in range(1, 5):
        state, _ = play(rule, state, clients, no_training, seed=t)
        assert distance(product(rule, state), (u * (s * c**t)) @ v.T) < 1e-6
        torch.testing.assert_close(
            state.tensors[f"{SITE}/s"], (s * c**t).sort(descending=True).values, rtol=1e-6, atol=0
        )
    if len({one.rank for one in clients}) > 1:
        assert product(rule, state).norm() < before.norm()


def test_five_rounds_without_training_collapse_replace_to_the_published_figures():
    # METHODS: ranks 4, 8, 16, 32, 64; ‖D‖ falls to 0.60 and σ_64 to 3e-4 of itself (flat spectrum:
    # c = 1 for four directions, 0.2 for the last 32; 0.2^5 = 3.2e-4).
    ranks = [4, 8, 16, 32, 64]
    rule, clients = FlexLoRA("replace"), fleet(ranks)
    state = widened(fresh_state(rule, (80, 70), clients))
    draw = torch.Generator().manual_seed(0)
    planted = LowRank(
        torch.randn(80, 64, generator=draw, dtype=torch.float64),
        torch.randn(64, 70, generator=draw, dtype=torch.float64),
    )
    state, _ = play(rule, state, [Client(64, 1.0, 1.0)], lambda *_: planted)
    start = state.tensors[f"{SITE}/s"]
    for t in range(5):
        state, _ = play(rule, state, clients, no_training, seed=t)
    end = state.tensors[f"{SITE}/s"]
    assert float(end[-1] / start[-1]) == pytest.approx(0.2**5, rel=1e-6)
    kept = float(end.norm() / start.norm())
    expected = sum(
        float(s) ** 2 * (sum(r > j for r in ranks) / 5) ** 10 for j, s in enumerate(start)
    )
    assert kept == pytest.approx(math.sqrt(expected) / float(start.norm()), rel=1e-6)
    assert kept < 0.7


@pytest.mark.parametrize("mode", ["delta", "tail-in-base"])
@pytest.mark.parametrize("split", SPLITS)
def test_factors_rounded_on_the_wire_do_not_move_the_fixed_point(mode, split):
    """What was sent is subtracted, so bf16 rounding of the starts leaves D where it was."""
    rule, clients = FlexLoRA(mode, split), fleet([1, 2, 4, 8])
    state = fresh_state(rule, SHAPE, clients)
    state, _ = play(rule, state, clients, noisy_training(0, dtype=torch.float32))
    d = product(rule, state)

    def contributions(t, received):
        for client in clients:
            exact = rule.assign_site(state, SITE, client.rank, client.scale, t)
            sent = SiteAssignment(exact.start.to(dtype=torch.bfloat16), exact.frozen)
            yield Contribution(client.weight, sent, received(sent.start))

    for t in range(5):
        state, _ = rule.merge_site(
            state, SITE, contributions(t, lambda start: start.to(dtype=torch.float32))
        )
        # Five factorisations in float32, about 1e-7 each; bf16 itself rounds by 4e-3.
        assert distance(product(rule, state), d) < 2e-6

    # Not identical bit by bit either, as when training divides and multiplies by s.
    def off_by_rounding(start):
        wide = start.to(dtype=torch.float32)
        return LowRank(wide.b / 3.0 * 3.0, wide.a)

    state, _ = rule.merge_site(state, SITE, contributions(9, off_by_rounding))
    assert distance(product(rule, state), d) < 2e-6


@given(rules, fleets(), st.integers(0, 100))
@relaxed
def test_only_products_of_what_clients_return_matter(rule, clients, seed):
    """Gauge: (BG, G⁻¹A) for any invertible G gives the same aggregate."""
    state = full_rank_start(rule, max(c.rank for c in clients))
    plain = noisy_training(seed)

    def turned(i, assigned):
        result = plain(i, assigned)
        draw = torch.Generator().manual_seed(seed + i)
        g = torch.randn(result.rank, result.rank, generator=draw, dtype=torch.float64)
        g = torch.linalg.qr(g).Q * torch.logspace(-2, 2, result.rank, dtype=torch.float64)
        return LowRank(result.b @ g, torch.linalg.solve(g, result.a))

    one, _ = play(rule, state, clients, plain)
    two, _ = play(rule, state, clients, turned)
    assert_same_aggregate(rule, one, two)


def assert_same_aggregate(rule, one, two):
    """Compare what is unique: singular values, and the product unless the cut is a near tie."""
    s, t = (state.tensors[f"{SITE}/s"] for state in (one, two))
    torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-9 * float(s[0]))
    assert distance(product(rule, two), product(rule, one)) < 1e-7


@given(rules, fleets(), st.randoms(use_true_random=False))
@relaxed
def test_the_order_of_clients_does_not_matter(rule, clients, random):
    state = full_rank_start(rule, max(c.rank for c in clients))
    order = [*range(len(clients))]
    random.shuffle(order)
    training = noisy_training(1)
    one, _ = play(rule, state, clients, training)
    two, _ = play(
        rule, state, [clients[i] for i in order], lambda i, assigned: training(order[i], assigned)
    )
    assert_same_aggregate(rule, one, two)


@given(rules, fleets(), st.integers(0, 5), st.floats(0.1, 0.9))
@relaxed
def test_a_client_split_in_two_counts_as_the_one(rule, clients, which, share):
    which %= len(clients)
    state = full_rank_start(rule, max(c.rank for c in clients))
    training = noisy_training(2)
    client = clients[which]
    halves = [
        Client(client.rank, client.scale, client.weight * part) for part in (share, 1 - share)
    ]
    split = clients[:which] + halves + clients[which + 1 :]
    one, _ = play(rule, state, clients, training)
    two, _ = play(
        rule, state, split, lambda i, assigned: training(i if i <= which else i - 1, assigned)
    )
    assert_same_aggregate(rule, one, two)


@given(rules, fleets(equal=True))
@relaxed
def test_with_equal_ranks_all_modes_coincide(rule, clients):
    plain = FlexLoRA("replace", rule.split)
    state = full_rank_start(rule, clients[0].rank)
    for t in range(3):
        one, _ = play(rule, state, clients, noisy_training(t))
        two, _ = play(plain, state, clients, noisy_training(t))
        assert distance(product(rule, one), product(plain, two)) < 1e-9
        state = one


@given(rules, fleets())
@relaxed
def test_scale_is_taken_out_once_on_dealing_and_folded_in_once_on_return(rule, clients):
    """Clients that train ΔW = s·B A in factors without s merge as if every s were one.

    Each client triples its effective update, whatever its s = α/r or α/√r. Were s applied twice, or
    never, on either way, the aggregate would move by a power of s.
    """
    state = full_rank_start(rule, max(c.rank for c in clients))
    d = product(rule, state)

    def tripled(i, assigned):
        s = clients[i].scale
        b, a = assigned.start.b / s, assigned.start.a  # what LoRA holds
        return LowRank(s * (3.0 * b), a)

    after, _ = play(rule, state, clients, tripled)
    starts = [(c.weight, best(d, c.rank)) for c in clients]
    mean = sum(w * start for w, start in starts)
    expected = {"replace": 3.0 * mean}.get(rule.mode, d + 2.0 * mean)
    assert distance(product(rule, after), expected) < 1e-9


@given(rules, fleets())
@relaxed
def test_every_client_counts(rule, clients):
    state = full_rank_start(rule, max(c.rank for c in clients))
    rest, _ = play(rule, state, clients, no_training)
    for j in range(len(clients)):

        def only_j(i, assigned, j=j):
            result = no_training(i, assigned)
            return result.scale(3.0) if i == j else result

        moved, _ = play(rule, state, clients, only_j)
        assert distance(product(rule, moved), product(rule, rest)) > 1e-4


@given(rules, fleets(), st.booleans())
@relaxed
def test_a_client_that_trains_one_factor_only_counts_in_full(rule, clients, only_b):
    """Factors that agree with what was sent in B alone, or in A alone, are not what was sent."""
    state = full_rank_start(rule, max(c.rank for c in clients))
    d = product(rule, state)

    def doubled(_, assigned):
        b, a = assigned.start.b.clone(), assigned.start.a.clone()
        return LowRank(2.0 * b, a) if only_b else LowRank(b, 2.0 * a)

    after, _ = play(rule, state, clients, doubled)
    mean = sum(c.weight * best(d, c.rank) for c in clients)
    expected = {"replace": 2.0 * mean}.get(rule.mode, d + mean)
    assert distance(product(rule, after), expected) < 1e-9


@given(rules, fleets())
@relaxed
def test_aggregate_is_the_definition_in_dense_matrices(rule, clients):
    server = max(c.rank for c in clients)
    state = full_rank_start(rule, server)
    d = product(rule, state)
    training = noisy_training(4)
    after, report = play(rule, state, clients, training)
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for i, client in enumerate(clients):
        assigned = rule.assign_site(state, SITE, client.rank, client.scale, 0)
        result = training(i, assigned).dense()
        increment = {"replace": result}.get(rule.mode, d + result - assigned.start.dense())
        total += client.weight * increment
    s = torch.linalg.svdvals(total)
    optimum = float(s[server:].square().sum())
    assert float((total - product(rule, after)).square().sum()) == pytest.approx(
        optimum, rel=1e-6, abs=1e-18 * float(s[0]) ** 2
    )
    assert report.energy == pytest.approx(float(s.square().sum()), rel=1e-9)
    assert report.discarded == pytest.approx(optimum, rel=1e-6, abs=1e-15 * report.energy)


@given(rules, fleets())
@relaxed
def test_every_client_starts_at_the_best_approximation_of_its_rank_after_any_round(rule, clients):
    state = full_rank_start(rule, max(c.rank for c in clients))
    state, _ = play(rule, state, clients, noisy_training(5))
    d = product(rule, state)
    for client in clients:
        assigned = rule.assign_site(state, SITE, client.rank, client.scale, seed=1)
        assert distance(assigned.start.dense(), best(d, client.rank)) < 1e-9


@given(rules, fleets())
@relaxed
def test_the_same_state_and_seed_deal_the_same_bits(rule, clients):
    torch.manual_seed(0)
    one = full_rank_start(rule, max(c.rank for c in clients))
    torch.manual_seed(1)
    two = full_rank_start(rule, max(c.rank for c in clients))
    for client in clients:
        a, b = (rule.assign_site(s, SITE, client.rank, client.scale, 3).start for s in (one, two))
        assert torch.equal(a.b, b.b)
        assert torch.equal(a.a, b.a)


@given(fleets(equal=True), st.integers(0, 100))
@relaxed
def test_fedit_does_not_depend_on_order_or_splitting(clients, seed):
    rule = FedIT()
    state = widened(fresh_state(rule, SHAPE, clients))
    training = noisy_training(seed)
    one, _ = play(rule, state, clients, training)
    back = len(clients) - 1
    two, _ = play(rule, state, clients[::-1], lambda i, assigned: training(back - i, assigned))
    halves = [Client(c.rank, c.scale, c.weight / 2) for c in clients for _ in range(2)]
    three, _ = play(rule, state, halves, lambda i, assigned: training(i // 2, assigned))
    for other in (two, three):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-12, atol=1e-12)


def test_delta_recovers_a_planted_update_that_replace_cannot():
    """Noiseless quadratic, mixed ranks: `replace` stalls far from the target, `delta` goes on."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(30, 8, generator=draw, dtype=torch.float64) @ torch.randn(
        8, 24, generator=draw, dtype=torch.float64
    )
    clients = fleet([1, 2, 4, 8], alpha=8.0)

    def descend(i, assigned):
        # ‖BA + F − target‖² along B then A, exactly (alternating least squares): idle where done.
        frozen = 0.0 if assigned.frozen is None else assigned.frozen.dense()
        b = (target - frozen) @ torch.linalg.pinv(assigned.start.a)
        return LowRank(b, torch.linalg.pinv(b) @ (target - frozen))

    reached = {}
    for mode in MODES:
        rule = FlexLoRA(mode)
        state = widened(fresh_state(rule, (30, 24), clients))
        for t in range(30):
            state, _ = play(rule, state, clients, descend, seed=t)
        reached[mode] = distance(product(rule, state), target)
    assert reached["replace"] > 0.3
    assert reached["delta"] < 0.1 * reached["replace"]
    assert reached["tail-in-base"] < 0.1 * reached["replace"]
