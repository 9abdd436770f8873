"""What holds of every aggregation rule, alone and behind SLoRA's sparse stage, for any fleet.

Everything runs in float64 unless a dtype is the point, so tolerances are 1e-9 or smaller.
"""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation_rounds import (
    SITE,
    Client,
    distance,
    fleets,
    fresh_state,
    no_training,
    noisy_training,
    play,
    play_round,
    product,
    widened,
)
from polyrank.aggregation import RULES, FedIT, HetLoRA, Segment, State
from polyrank.algebra import Dense, LowRank, Sparse
from polyrank.errors import RuleError, UpdateError
from rules import ROWS, SPARSE_FIRST, named

SHAPE = (13, 10)
EVERY = [*RULES.values(), *SPARSE_FIRST]

relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
rules = st.sampled_from(EVERY)


@st.composite
def cases(draw):
    """Draw a rule, a fleet that it takes, and its float64 state after one round of training."""
    rule = draw(rules)
    clients = draw(fleets(equal=not rule.mixed_ranks))
    state = widened(fresh_state(rule, SHAPE, clients))
    state, _ = play_round(rule, state, clients, noisy_training(draw(st.integers(0, 9))))
    return rule, state, clients


def assert_same(rule, one, two):
    assert distance(product(rule, two), product(rule, one)) < 1e-7
    assert one.scalars.keys() == two.scalars.keys()


@given(cases(), st.randoms(use_true_random=False))
@relaxed
def test_the_order_of_clients_does_not_matter(case, random):
    rule, state, clients = case
    order = [*range(len(clients))]
    random.shuffle(order)
    training = noisy_training(11)
    one, _ = play(rule, state, clients, training)
    two, _ = play(
        rule,
        state,
        [clients[i] for i in order],
        lambda i, assigned: training(order[i], assigned),
        names=order,
    )
    assert_same(rule, one, two)


@given(cases(), st.integers(0, 5), st.floats(0.1, 0.9))
@relaxed
def test_a_client_split_in_two_counts_as_the_one(case, which, share):
    rule, state, clients = case
    which %= len(clients)
    training, client = noisy_training(12), clients[which]
    halves = [Client(client.rank, client.scale, client.weight * w) for w in (share, 1 - share)]
    split = clients[:which] + halves + clients[which + 1 :]
    one, _ = play(rule, state, clients, training)
    names = [i if i <= which else i - 1 for i in range(len(split))]
    two, _ = play(rule, state, split, lambda i, assigned: training(names[i], assigned), names=names)
    assert_same(rule, one, two)


@given(cases())
@relaxed
def test_every_client_counts(case):
    rule, state, clients = case
    rest, _ = play(rule, state, clients, noisy_training(13))
    for j in range(len(clients)):

        def only_j(i, assigned, j=j):
            return noisy_training(14 if i == j else 13)(i, assigned)

        moved, _ = play(rule, state, clients, only_j)
        assert distance(product(rule, moved), product(rule, rest)) > 1e-4


@given(cases())
@relaxed
def test_rounds_without_training_keep_the_adapter_under_the_rules_that_say_so(case):
    rule, state, clients = case
    before = product(rule, state)
    for t in range(3):
        state, _ = play_round(rule, state, clients, no_training, seed=t)
    mixed = len({client.rank for client in clients}) > 1
    change = distance(product(rule, state), before)
    if rule in SPARSE_FIRST or ROWS[rule.name].idle_is_still:
        assert change < 1e-9
    elif mixed:
        assert change > 1e-6


def test_there_is_a_row_for_every_rule_and_it_says_what_the_rule_excludes():
    assert ROWS.keys() == RULES.keys()
    for name, rule in RULES.items():
        assert rule.excludes.keys() == ROWS[name].excludes
        assert all(len(reason) > 20 for reason in rule.excludes.values())


@given(cases(), st.integers(0, 5))
@relaxed
def test_the_same_state_and_seed_deal_the_same_bits_and_ranks_nest(case, seed):
    rule, state, clients = case
    state = State(state.tensors, json.loads(json.dumps(state.scalars)))  # as after a resume
    assigned = {}
    for client in clients:
        one, two = (rule.assign_site(state, SITE, client.rank, 2.0, seed).start for _ in range(2))
        assert one.shape == SHAPE
        assigned[client.rank] = one
        for x, y in zip(one.tensors().values(), two.tensors().values(), strict=True):
            assert torch.equal(x, y)
    largest = assigned[max(assigned)]
    for rank, one in assigned.items():
        if isinstance(one, Sparse):
            assert torch.equal(one.positions, largest.positions[: len(one.positions)])
        elif isinstance(one, Dense):
            assert torch.equal(one.matrix, largest.matrix)
        else:
            assert one.rank == rank
            assert torch.equal(one.b, largest.b[:, :rank])
            assert torch.equal(one.a, largest.a[:rank])


@given(cases())
@relaxed
def test_the_report_gives_the_energy_of_the_adapter_and_of_what_was_cut(case):
    rule, state, clients = case
    after, report = play(rule, state, clients, noisy_training(15))
    kept = float(product(rule, after).square().sum())
    assert report.energy == pytest.approx(kept + report.discarded, rel=1e-6)
    assert report.discarded >= 0


@given(cases())
@relaxed
def test_the_adapter_is_ordered_by_singular_value_or_exact(case):
    rule, state, _ = case
    one = rule.adapter(state)[SITE]
    if isinstance(one, LowRank):
        sizes = one.b.norm(dim=0)
        torch.testing.assert_close(
            sizes, torch.linalg.svdvals(one.dense())[: one.rank], rtol=1e-6, atol=1e-9
        )
    else:
        assert isinstance(one, Dense | Sparse)


@given(cases())
@relaxed
def test_a_merge_leaves_the_state_before_as_it_was(case):
    rule, state, clients = case
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    scalars = json.dumps(state.scalars)
    play_round(rule, state, clients, noisy_training(16))
    assert json.dumps(state.scalars) == scalars
    for name, tensor in before.items():
        assert torch.equal(state.tensors[name], tensor)


@pytest.mark.parametrize("rule", EVERY, ids=named)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_state_is_float32_or_as_wide_as_what_came(rule, dtype):
    clients = [Client(r, 1.0, 0.5) for r in ((2, 4) if rule.mixed_ranks else (4, 4))]
    state = fresh_state(rule, SHAPE, clients)
    state, _ = play_round(rule, state, clients, noisy_training(0, dtype=dtype))
    widest = torch.promote_types(dtype, torch.float32)
    kinds = {t.dtype for t in state.tensors.values() if t.is_floating_point()}
    # Behind the sparse stage the inner rule's own tensors wait in float32.
    assert widest in kinds
    assert kinds <= {widest, torch.float32}
    assert rule.adapter(state)[SITE].dense().dtype == widest


@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_what_is_not_finite_and_weights_that_are_no_shares_are_refused_by_site(rule):
    clients = [Client(4, 1.0, 0.5), Client(4, 1.0, 0.5)]
    state = fresh_state(rule, SHAPE, clients)

    def exploded(i, assigned):
        bad = noisy_training(0)(i, assigned)
        return bad.scale(float("inf")) if i == 1 else bad

    with pytest.raises(UpdateError, match=f"1 at '{SITE}' has entries that are NaN or infinite"):
        play(rule, state, clients, exploded)
    with pytest.raises(RuleError, match=f"'{SITE}' sum to"):
        play(rule, state, clients[:1], no_training)
    with pytest.raises(RuleError, match="has weight -1"):
        play(rule, state, [Client(4, 1.0, -1.0)], no_training)
    with pytest.raises(RuleError, match="at least one"):
        play(rule, state, [], no_training)


@given(fleets(equal=True), st.integers(0, 9))
@relaxed
def test_with_equal_ranks_segment_and_hetlora_without_pruning_are_fedit(clients, seed):
    fedit = FedIT()
    begin = widened(fresh_state(fedit, SHAPE, clients))
    for other in (Segment(), HetLoRA(gamma=1.0)):
        one = two = begin
        for t in range(2):
            one, _ = play(fedit, one, clients, noisy_training(seed + t))
            two, _ = play(other, two, clients, noisy_training(seed + t))
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-12, atol=1e-12)
