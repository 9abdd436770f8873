"""SLoRA: a sparse first stage, then another rule from its factors."""

import json

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
    play_round,
    product,
    widened,
)
from polyrank.aggregation import (
    RULES,
    Contribution,
    FedIT,
    FleetSpec,
    FlexLoRA,
    HetLoRA,
    Segment,
    SLoRA,
    assign,
    rule,
)
from polyrank.algebra import Sparse
from polyrank.errors import RankError, RuleError, SiteError, UpdateError

SHAPE = (14, 11)  # 25 entries per rank, 154 in all
RANKS = [1, 2, 4, 8]
RULE = SLoRA(FlexLoRA(), 2)
INNER = [name for name, known in RULES.items() if "slora" not in known.excludes]


def test_what_clients_train_nests_as_ranks_do_and_ends_at_the_whole_matrix():
    state = fresh_state(RULE, SHAPE, fleet(RANKS))
    starts = {rank: RULE.assign_site(state, SITE, rank, 2.0, seed=rank).start for rank in RANKS}
    assert [len(one.values) for one in starts.values()] == [25, 50, 100, 154]
    largest = starts[8].positions
    for one in starts.values():
        assert torch.equal(one.positions, largest[: len(one.positions)])
        assert not one.values.any()
        assert one.shape == SHAPE
    assert sorted(largest.tolist()) == list(range(154))


def test_positions_come_from_the_fleets_seed_and_the_site_and_stay():
    shapes = dict.fromkeys(("q", "k"), SHAPE)

    def starts(seed, deal_seed=0):
        spec = FleetSpec(shapes, {}, dict.fromkeys(shapes, 2), seed=seed)
        state = RULE.init(spec)
        return {s: RULE.assign_site(state, s, 2, 1.0, deal_seed).start.positions for s in shapes}

    assert torch.equal(starts(0)["q"], starts(0, deal_seed=9)["q"])
    assert not torch.equal(starts(0)["q"], starts(1)["q"])
    assert not torch.equal(starts(0)["q"], starts(0)["k"])


def test_assignments_are_sparse_and_count_values_alone():
    state = fresh_state(RULE, SHAPE, fleet(RANKS))
    assignment = assign(RULE, state, {SITE: 2}, {SITE: 1.0}, 0)
    assert isinstance(assignment.start[SITE], Sparse)
    assert assignment.train == "both"
    assert assignment.nbytes == assignment.travelling(assignment.start) == 50 * 4


def test_increments_of_values_are_averaged_and_what_nobody_holds_stays():
    clients = fleet([1, 2, 4], weights=[0.5, 0.3, 0.2])
    state = widened(fresh_state(RULE, SHAPE, clients, server_rank=5))
    state, _ = play(RULE, state, fleet([5]), noisy_training(0))
    before, training = product(RULE, state), noisy_training(1)
    after, report = play(RULE, state, clients, training)
    expected = before.clone()
    for i, c in enumerate(clients):
        assigned = RULE.assign_site(state, SITE, c.rank, c.scale, 0)
        expected += c.weight * (training(i, assigned).dense() - assigned.start.dense())
    assert distance(product(RULE, after), expected) < 1e-12
    assert report.energy == pytest.approx(float(expected.square().sum()))
    assert report.discarded == 0.0
    held = state.tensors[f"{SITE}/sparse-positions"][100:]
    assert held.numel() > 0
    assert torch.equal(product(RULE, after).flatten()[held], before.flatten()[held])


def test_with_equal_ranks_it_is_the_mean_of_the_values():
    clients = fleet([3, 3, 3], weights=[0.5, 0.3, 0.2])
    state = widened(fresh_state(RULE, SHAPE, clients))
    state, _ = play(RULE, state, clients, noisy_training(0))
    training = noisy_training(1)
    after, _ = play(RULE, state, clients, training)
    assigned = RULE.assign_site(state, SITE, 3, 1.0, 0)
    mean = sum(c.weight * training(i, assigned).dense() for i, c in enumerate(clients))
    assert distance(product(RULE, after), mean) < 1e-12


def test_sparse_rounds_without_training_are_fixed_points():
    clients = fleet(RANKS)
    state, _ = play(RULE, fresh_state(RULE, SHAPE, clients), clients, noisy_training(0))
    values = state.tensors[f"{SITE}/sparse-values"]
    for _ in range(3):
        state, _ = play(RULE, state, clients, no_training)
    torch.testing.assert_close(state.tensors[f"{SITE}/sparse-values"], values, rtol=0, atol=0)


@pytest.mark.parametrize("name", INNER)
def test_after_the_last_sparse_round_the_inner_rule_starts_from_its_factors(name):
    inner = rule(name)
    staged = SLoRA(inner, 2)
    clients = fleet([1, 2, 4] if inner.mixed_ranks else [4, 4, 4])
    state = widened(fresh_state(staged, SHAPE, clients))
    assert staged.name == f"{name}+slora"
    state, _ = play_round(staged, state, clients, noisy_training(0))
    assert isinstance(staged.adapter(state)[SITE], Sparse)
    merged, _ = play(staged, state, clients, noisy_training(1))
    total = product(staged, merged)
    assert float((total - best(total, 4)).norm()) > 0.1  # so that the cut is seen

    state = staged.conclude(merged, ["0", "1", "2"])
    assert distance(product(staged, state), best(total, 4)) < 1e-12
    assert {name.rpartition("/")[2] for name in state.tensors} == {
        name.rpartition("/")[2] for name in fresh_state(inner, SHAPE, clients).tensors
    }
    for rank in {client.rank for client in clients}:
        start = staged.assign_site(state, SITE, rank, 2.0, seed=1).start
        assert distance(start.dense(), best(total, rank)) < 1e-12

    # From here on it is the inner rule, bit by bit.
    one, _ = play_round(staged, state, clients, noisy_training(2))
    two, _ = play_round(inner, state, clients, noisy_training(2))
    for what, tensor in two.tensors.items():
        assert torch.equal(one.tensors[what], tensor)
    assert staged.adapter(one).hash() == inner.adapter(two).hash()
    assert json.loads(json.dumps(one.scalars)) == one.scalars


@pytest.mark.parametrize("name", INNER)
def test_directions_without_a_start_can_still_train(name):
    inner = rule(name)
    staged, clients = SLoRA(inner, 1), fleet([4, 4])
    state = fresh_state(staged, SHAPE, clients)
    one_entry = lambda _, assigned: Sparse(  # noqa: E731
        torch.eye(len(assigned.start.values))[0], assigned.start.positions, SHAPE
    )
    state, _ = play_round(staged, state, clients, one_entry)  # ΔW of rank 1
    start = staged.assign_site(state, SITE, 4, 1.0, seed=0).start
    assert distance(start.dense(), product(staged, state)) < 1e-6
    assert (start.b.norm(dim=0) > 0).tolist() == [True, False, False, False]
    assert (start.a.norm(dim=1) > 0).all()


def test_a_first_stage_in_which_nothing_moved_ends_as_the_inner_rule_begins():
    for inner in (FlexLoRA(), HetLoRA()):
        staged, clients = SLoRA(inner, 1), fleet([2, 4])
        state, _ = play_round(staged, fresh_state(staged, SHAPE, clients), clients, no_training)
        assert not product(staged, state).any()
        plain = fresh_state(inner, SHAPE, clients)
        one, two = (
            r.assign_site(s, SITE, 4, 1.0, 7).start for r, s in [(staged, state), (inner, plain)]
        )
        assert torch.equal(one.a, two.a)
        assert torch.equal(one.b, two.b)


def test_weights_ranks_and_downloads_are_those_of_the_inner_rule():
    staged = SLoRA(HetLoRA(gamma=0.5), 1)
    clients = fleet([4, 4])
    state, _ = play_round(staged, fresh_state(staged, SHAPE, clients), clients, noisy_training(0))
    assert staged.weigh(state, {"0": 5.0}, lambda _: 2.0) == {"0": 2.0}

    def shrunk(_, assigned):
        return assigned.start.scale(0.5)

    state, _ = play_round(staged, state, clients, shrunk)
    assert staged.ranks(state, "0", {SITE: 4}) == {SITE: 2}
    assert staged.catch_up(state, "0") == 0
    assert not SLoRA(FedIT(), 1).mixed_ranks


def test_the_end_of_a_round_is_told_to_the_inner_rule_once_it_is_its_own():
    class Told(Segment):
        def conclude(self, state, clients):
            return state.update({}, {"told": [*clients]})

    staged = SLoRA(Told(), 1)
    state = staged.conclude(fresh_state(staged, SHAPE, fleet([4])), ["ada"])
    assert "told" not in state.scalars
    assert staged.conclude(state, ["bob"]).scalars["told"] == ["bob"]


def test_what_makes_no_sense_is_refused_by_name():
    with pytest.raises(RuleError, match="at least 1 sparse round, got 0"):
        SLoRA(FlexLoRA(), 0)
    with pytest.raises(RuleError, match=r"flexlora\+slora: it is that already"):
        SLoRA(RULE, 1)
    with pytest.raises(RuleError, match="one rank per site"):
        fresh_state(SLoRA(FedIT(), 1), SHAPE, fleet([2, 4]))
    state = fresh_state(RULE, SHAPE, fleet([2]))
    with pytest.raises(SiteError, match="'other'"):
        RULE.assign_site(state, "other", 2, 1.0, 0)
    with pytest.raises(RankError):
        RULE.assign_site(state, SITE, 12, 1.0, 0)
    assigned = RULE.assign_site(state, SITE, 2, 1.0, 0)
    start = assigned.start
    wrong = {
        "expected a sparse update": FlexLoRA().assign_site(state, SITE, 2, 1.0, 0).start,
        "other positions": Sparse(start.values, start.positions.flip(0), SHAPE),
        "NaN or infinite": start.scale(float("nan")),
        "25 values": Sparse(start.values[:25], start.positions[:25], SHAPE),
    }
    for message, result in wrong.items():
        with pytest.raises(UpdateError, match=message):
            RULE.merge_site(state, SITE, iter([Contribution(1.0, assigned, result)]))
    with pytest.raises(RuleError, match="sum to"):
        RULE.merge_site(state, SITE, iter([Contribution(0.5, assigned, start)]))
