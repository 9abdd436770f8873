"""FFA-LoRA: one frozen A, and an average that is exact."""

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
    product,
    widened,
)
from polyrank.aggregation import (
    FFA,
    Contribution,
    FleetSpec,
    FlexLoRA,
    SiteAssignment,
    SLoRA,
    assign,
)
from polyrank.algebra import LowRank
from polyrank.errors import RankError, RuleError, UpdateError

SHAPE = (14, 11)
RANKS = [1, 2, 4, 8]
CORRECTED, PLAIN = FFA(), FFA(correction=False)


def trained(rule, clients, rounds=1):
    state = widened(fresh_state(rule, SHAPE, clients))
    for t in range(rounds):
        state, _ = play(rule, state, clients, noisy_training(t))
    return state


@pytest.mark.parametrize("rule", [CORRECTED, PLAIN], ids=lambda rule: rule.name)
def test_with_equal_ranks_the_mean_of_b_times_a_is_the_mean_of_the_products(rule):
    clients = fleet([4, 4, 4], weights=[0.5, 0.2, 0.3])
    before = trained(rule, clients)
    training = noisy_training(1)
    after, report = play(rule, before, clients, training)
    products = [
        c.weight * training(i, rule.assign_site(before, SITE, 4, c.scale, 0)).dense()
        for i, c in enumerate(clients)
    ]
    assert distance(product(rule, after), sum(products)) < 1e-12
    assert report.energy == pytest.approx(float(sum(products).square().sum()))


def test_under_mixed_ranks_the_increments_are_averaged_exactly():
    clients = fleet(RANKS, weights=[0.4, 0.3, 0.2, 0.1])
    before = trained(CORRECTED, clients)
    training = noisy_training(1)
    after, _ = play(CORRECTED, before, clients, training)
    expected = product(CORRECTED, before)
    for i, c in enumerate(clients):
        assigned = CORRECTED.assign_site(before, SITE, c.rank, c.scale, 0)
        expected = expected + c.weight * (training(i, assigned).dense() - assigned.start.dense())
    assert distance(product(CORRECTED, after), expected) < 1e-12


def test_without_the_correction_b_is_the_mean_of_padded_factors_and_collapses():
    clients = fleet(RANKS)
    before = trained(PLAIN, clients)
    training = noisy_training(1)
    after, _ = play(PLAIN, before, clients, training)
    b = sum(
        c.weight * padded(training(i, PLAIN.assign_site(before, SITE, c.rank, 1.0, 0)), 8).b
        for i, c in enumerate(clients)
    )
    assert distance(after.tensors[f"{SITE}/b"], b) < 1e-12
    c = torch.tensor([sum(r > j for r in RANKS) / 4 for j in range(8)]).double()
    idle, _ = play(PLAIN, before, clients, no_training)
    assert distance(idle.tensors[f"{SITE}/b"], before.tensors[f"{SITE}/b"] * c) < 1e-12
    kept, _ = play(CORRECTED, before, clients, no_training)
    assert distance(kept.tensors[f"{SITE}/b"], before.tensors[f"{SITE}/b"]) < 1e-12


def test_b_rounded_on_the_wire_does_not_move_the_fixed_point():
    clients = fleet(RANKS)
    state = trained(CORRECTED, clients)

    def contributions():
        for client in clients:
            exact = CORRECTED.assign_site(state, SITE, client.rank, client.scale, 0).start
            sent = exact.to(dtype=torch.bfloat16)
            assert not torch.equal(sent.b.double(), exact.b)
            yield Contribution(client.weight, SiteAssignment(sent, train="b"), sent)

    after, _ = CORRECTED.merge_site(state, SITE, contributions())
    assert distance(product(CORRECTED, after), product(CORRECTED, state)) < 1e-12


def test_a_is_the_same_for_all_and_for_ever_and_does_not_travel():
    clients = fleet(RANKS)
    first = fresh_state(CORRECTED, SHAPE, clients)
    state = first
    for t in range(2):
        state, _ = play(CORRECTED, state, clients, noisy_training(t, dtype=torch.float32), seed=t)
    assert torch.equal(state.tensors[f"{SITE}/a"], first.tensors[f"{SITE}/a"])
    for rank in RANKS:
        assigned = CORRECTED.assign_site(state, SITE, rank, 1.0, seed=rank)
        assert assigned.train == "b"
        assert torch.equal(assigned.start.a, first.tensors[f"{SITE}/a"][:rank])
        assert torch.equal(assigned.start.b, state.tensors[f"{SITE}/b"][:, :rank])
    assert 0 < float(assigned.start.a.abs().max()) <= 11**-0.5
    assignment = assign(CORRECTED, state, {SITE: 8}, {SITE: 1.0}, 0)
    assert assignment.train == "b"
    assert assignment.nbytes == assignment.travelling(assignment.start) == 14 * 8 * 4


def test_the_server_step_is_linear_in_what_clients_send():
    # So that a secure sum of the weighted B is all that the server needs.
    clients = fleet([4, 4])
    state = trained(CORRECTED, clients)
    one, two = (noisy_training(t) for t in (1, 2))

    def mean(i, assigned):
        return LowRank(0.5 * (one(i, assigned).b + two(i, assigned).b), assigned.start.a)

    halves = [product(CORRECTED, play(CORRECTED, state, clients, how)[0]) for how in (one, two)]
    both = product(CORRECTED, play(CORRECTED, state, clients, mean)[0])
    assert distance(both, 0.5 * (halves[0] + halves[1])) < 1e-12


def test_the_adapter_is_ordered_by_singular_value_while_sent_columns_stay_nested():
    clients = fleet(RANKS)
    state = trained(CORRECTED, clients, rounds=2)
    adapter = CORRECTED.adapter(state)[SITE]
    expected = torch.linalg.svdvals(product(CORRECTED, state))[:8]
    torch.testing.assert_close(adapter.b.norm(dim=0), expected)
    assert adapter.rank == 8


def test_what_makes_no_sense_is_refused_by_name():
    state = fresh_state(CORRECTED, SHAPE, fleet([4]))

    def trains_a(_, assigned):
        return LowRank(assigned.start.b, 2.0 * assigned.start.a)

    with pytest.raises(UpdateError, match=r"client '0' returned another A at"):
        play(CORRECTED, state, fleet([4]), trains_a)
    spec = FleetSpec({SITE: SHAPE}, {"ada": {SITE: 8}}, {SITE: 4}, seed=0)
    with pytest.raises(RankError, match="client 'ada'"):
        CORRECTED.init(spec)
    with pytest.raises(RuleError, match="A of its own"):
        SLoRA(CORRECTED, 1)
    with pytest.raises(RuleError, match="cannot start from a given update"):
        CORRECTED.started(state, {})
    assert not FlexLoRA().excludes
