"""FLoRA: an exact sum beside the base, and adapters that begin anew."""

import json

import pytest
import torch

import federations
from aggregation_rounds import (
    SITE,
    distance,
    fleet,
    fresh_state,
    noisy_training,
    play,
    play_round,
    product,
    widened,
)
from polyrank.aggregation import Contribution, FleetSpec, FLoRA, SLoRA, State, assign
from polyrank.algebra import Dense, LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError
from polyrank.planning import Fleet, LoRAType
from polyrank.run import RunSettings

SHAPE = (14, 11)
RANKS = [1, 2, 4, 8]
RULE = FLoRA()


def test_all_updates_of_all_rounds_add_up_exactly():
    clients = fleet(RANKS, weights=[0.4, 0.3, 0.2, 0.1])
    state = widened(fresh_state(RULE, SHAPE, clients))
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for t in range(3):
        training = noisy_training(t)
        for i, c in enumerate(clients):
            assigned = RULE.assign_site(state, SITE, c.rank, c.scale, t)
            expected += c.weight * training(i, assigned).dense()
        state, report = play(RULE, state, clients, training, seed=t)
        assert distance(product(RULE, state), expected) < 1e-12
        assert report.energy == pytest.approx(float(expected.square().sum()))
        assert report.discarded == 0.0


def test_stacks_of_more_than_a_batch_add_up_too():
    clients = fleet([8] * 70)  # 560 directions, more than twice a batch of 256
    state = widened(fresh_state(RULE, SHAPE, clients))
    training = noisy_training(0)
    after, _ = play(RULE, state, clients, training)
    starts = [RULE.assign_site(state, SITE, 8, 1.0, 0)] * 70
    expected = sum(training(i, one).dense() / 70 for i, one in enumerate(starts))
    assert distance(product(RULE, after), expected) < 1e-12
    assert not state.tensors[f"{SITE}/merged"].any()  # the state before is as it was


def test_the_sum_is_float32_or_wider_whatever_travels():
    clients = fleet(RANKS)
    state = fresh_state(RULE, SHAPE, clients)
    low, _ = play(RULE, state, clients, noisy_training(0, dtype=torch.bfloat16))
    assert low.tensors[f"{SITE}/merged"].dtype == torch.float32
    high, _ = play(RULE, low, clients, noisy_training(0, dtype=torch.float64))
    assert high.tensors[f"{SITE}/merged"].dtype == torch.float64


def test_every_round_begins_at_zero_with_a_fresh_row_of_a_for_all():
    clients = fleet(RANKS)
    state = fresh_state(RULE, SHAPE, clients)
    state, _ = play(RULE, state, clients, noisy_training(0, dtype=torch.float32))
    large, small = (RULE.assign_site(state, SITE, rank, 1.0, seed=5).start for rank in (8, 2))
    assert not large.b.any()
    assert torch.equal(large.a[:2], small.a)
    assert 0 < float(large.a.abs().max()) <= 11**-0.5
    assert not torch.equal(RULE.assign_site(state, SITE, 8, 1.0, seed=6).start.a, large.a)


def test_one_tensor_serves_all_clients_and_there_is_none_before_the_first_merge():
    clients = fleet(RANKS)
    state = fresh_state(RULE, SHAPE, clients)
    assert not assign(RULE, state, {SITE: 4}, {SITE: 1.0}, 0).merged
    state, _ = play(RULE, state, clients, noisy_training(0, dtype=torch.float32))
    one, two = (assign(RULE, state, {SITE: r}, {SITE: 1.0}, 0).merged[SITE] for r in (1, 8))
    assert one.matrix is two.matrix is state.tensors[f"{SITE}/merged"]
    adapter = RULE.adapter(state)[SITE]
    assert isinstance(adapter, Dense)
    assert torch.equal(adapter.matrix, one.matrix)


def test_a_client_downloads_the_stacks_that_it_missed_and_no_more():
    shape = (200, 100)  # large beside the stacks: 4·300 bytes for every rank of an update
    spec = FleetSpec({SITE: shape}, {c: {SITE: 4} for c in "abcd"}, {SITE: 4}, seed=0)
    state = RULE.init(spec)

    def round_of(state, ranks):
        def contributions():
            for client, rank in ranks.items():
                assigned = RULE.assign_site(state, SITE, rank, 1.0, 0)
                yield Contribution(1 / len(ranks), assigned, assigned.start, client)

        return RULE.conclude(RULE.merge_site(state, SITE, contributions())[0], [*ranks])

    def missed(state):
        return [RULE.catch_up(state, client) // 1200 for client in "abcd"]

    assert missed(state) == [0, 0, 0, 0]
    state = round_of(state, {"a": 1, "b": 2})
    assert missed(state) == [3, 3, 3, 3]  # those who took part have not seen the sum either
    state = round_of(state, {"a": 1})
    assert missed(state) == [1, 4, 4, 4]
    state = round_of(state, {"b": 2, "c": 4})
    assert missed(state) == [7, 6, 6, 10]
    for _ in range(20):
        state = round_of(state, {"a": 4})
    assert missed(state)[0] == 4
    assert RULE.catch_up(state, "d") == 200 * 100 * 4  # the sum itself is smaller by now
    assert json.loads(json.dumps(state.scalars)) == state.scalars


def test_stacks_of_all_sites_count_as_they_travelled():
    shapes = {"q": (200, 100), "up": (300, 100)}
    spec = FleetSpec(shapes, {"a": dict.fromkeys(shapes, 2)}, dict.fromkeys(shapes, 2), seed=0)
    state = RULE.init(spec)
    for site in shapes:
        assigned = RULE.assign_site(state, site, 2, 1.0, 0)
        sent = assigned.start.to(dtype=torch.bfloat16)
        none = Contribution(0.0, assigned, sent, "b")  # weighs nothing, so it is not sent on
        state, _ = RULE.merge_site(
            state, site, iter([Contribution(1.0, assigned, sent, "a"), none])
        )
    state = RULE.conclude(state, ["a"])
    assert RULE.catch_up(state, "b") == 2 * 2 * (300 + 400)
    assert RULE.catch_up(state, "b", {"q"}) == 2 * 2 * 300
    assert RULE.catch_up(state, "b", ["up"]) == 2 * 2 * 400
    assert RULE.catch_up(state, "b", []) == 0
    with pytest.raises(SiteError, match="'other'"):
        RULE.catch_up(state, "b", ["other"])


def test_what_is_missed_at_some_sites_is_told_for_every_round_and_adds_up():
    shapes = {"q": (200, 100), "up": (300, 100)}
    ranks = {c: dict.fromkeys(shapes, 4) for c in "abc"}
    state = RULE.init(FleetSpec(shapes, ranks, dict.fromkeys(shapes, 4), seed=0))
    for clients, rank, sites in ((["a"], 1, "q up"), (["b"], 2, "up"), (["a"], 4, "q")):
        for site in sites.split():  # in the second round nobody trains q, in the third nobody up
            assigned = RULE.assign_site(state, site, rank, 1.0, 0)
            sent = iter([Contribution(1.0, assigned, assigned.start, clients[0])])
            state, _ = RULE.merge_site(state, site, sent)
        state = RULE.conclude(state, clients)
    state = State(state.tensors, json.loads(json.dumps(state.scalars)))
    q, up = 4 * 300, 4 * 400  # bytes of one rank
    expected = {"a": (4 * q, 0), "b": (4 * q, 2 * up), "c": (5 * q, 3 * up)}
    for client, missed in expected.items():
        assert (RULE.catch_up(state, client, ["q"]), RULE.catch_up(state, client, ["up"])) == missed
        assert RULE.catch_up(state, client) == sum(missed)


def test_a_state_of_an_older_version_still_gives_its_adapter_and_refuses_to_go_on():
    state = fresh_state(RULE, SHAPE, fleet([2]))
    old = State(state.tensors, {"stacked": 0, "opened": 0, "seen": {}})
    assert RULE.adapter(old)[SITE].shape == SHAPE
    with pytest.raises(RuleError, match="older versions"):
        RULE.merged(old)


def test_an_attempt_that_came_to_nothing_leaves_no_trace():
    clients = fleet([2, 2])
    state, _ = play_round(RULE, fresh_state(RULE, SHAPE, clients), clients, noisy_training(0))
    before = (dict(state.scalars), state.tensors[f"{SITE}/merged"].clone())
    play(RULE, state, clients, noisy_training(1))
    assert dict(state.scalars) == before[0]
    assert torch.equal(state.tensors[f"{SITE}/merged"], before[1])


def test_what_makes_no_sense_is_refused_by_name():
    state = fresh_state(RULE, SHAPE, fleet([4]))
    with pytest.raises(RuleError, match="thrown away"):
        SLoRA(RULE, 1)
    with pytest.raises(RuleError, match="cannot start from a given update"):
        RULE.started(state, {})
    with pytest.raises(RankError):
        RULE.assign_site(state, SITE, 12, 1.0, 0)
    with pytest.raises(SiteError, match="'other'"):
        RULE.merge_site(state, "other", iter([]))
    assigned = RULE.assign_site(state, SITE, 4, 1.0, 0)
    narrow = LowRank(torch.ones(14, 1), torch.ones(1, 11))
    with pytest.raises(UpdateError, match="nothing is broadcast"):
        RULE.merge_site(state, SITE, iter([Contribution(1.0, assigned, narrow)]))
    with pytest.raises(RuleError, match="at least one"):
        RULE.merge_site(state, SITE, iter([]))


def test_the_sum_acts_also_at_sites_that_a_client_does_not_train():
    shapes = {"q": (6, 5), "up": (7, 5)}
    spec = FleetSpec(shapes, {"a": {"q": 2}, "b": {"up": 2}}, dict.fromkeys(shapes, 2), seed=0)
    state = RULE.init(spec)
    assigned = RULE.assign_site(state, "q", 2, 1.0, 0)
    sent = LowRank(torch.ones(6, 2), assigned.start.a)
    state, _ = RULE.merge_site(state, "q", iter([Contribution(1.0, assigned, sent, "a")]))
    state = RULE.conclude(state, ["a"])
    given = assign(RULE, state, {"up": 2}, {"up": 1.0}, 0)
    assert [*given.start] == ["up"]
    assert distance(given.merged["q"].matrix, sent.dense()) == 0
    assert not given.merged["up"].matrix.any()


def test_clients_that_train_different_sites_share_a_pass():
    data = federations.clients(seen=3)
    types = {
        "attention": LoRAType("attention", {"attention": 2}),
        "rest": LoRAType("rest", {"feed-forward": 2}),
    }
    fleet_ = Fleet.table({"c0": "attention", "c1": "rest", "c2": "rest"}, types=types)
    run_settings = RunSettings(evaluation=federations.MEASURED, cohort=3)
    with federations.opened(data=data, rule=RULE, fleet=fleet_, settings=run_settings) as run:
        records = list(run.rounds(2))
    assert [len(record.clients) - len(record.rejected) for record in records] == [3, 3]
