"""FLoRA whose clients go on with their own factors: start, what is kept, what travels."""

import json

import pytest
import torch

import federations
from aggregation_rounds import SITE, distance, fleet, fresh_state, noisy_training, play_round
from polyrank.aggregation import (
    Assignment,
    Contribution,
    FleetSpec,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    SiteAssignment,
    SLoRA,
    State,
    assign,
)
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import RankError, RuleError, UpdateError
from polyrank.planning import Scaling
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round
from polyrank.run import RunSettings, setup, storage

SHAPE = (14, 11)
KEEP = FLoRA(reinitialise=False)
ODD = "a/b ü"


def factors(rank, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(size, generator=draw, dtype=dtype) for size in ((14, rank), (rank, 11)))
    return LowRank(b, a)


def begun(**ranks):
    return KEEP.init(
        FleetSpec({SITE: SHAPE}, {c: {SITE: r} for c, r in ranks.items()}, {SITE: 8}, 0)
    )


def merged(state, **results):
    """Return the state after these clients returned this, equally weighed."""

    def contributions():
        for client, result in results.items():
            assigned = KEEP.assign_own(state, client, SITE, result.rank, 1.0, 0)
            yield Contribution(1 / len(results), assigned, result, client)

    return KEEP.conclude(KEEP.merge_site(state, SITE, contributions())[0], [*results])


def test_a_client_goes_on_where_it_stopped_and_its_negative_is_frozen_beside_it():
    sent = {"x": factors(2, 1), "y": factors(3, 2)}
    state = merged(begun(x=2, y=3), **sent)
    for client, result in sent.items():
        assigned = KEEP.assign_own(state, client, SITE, result.rank, 2.0, seed=7)
        assert torch.equal(assigned.start.b, result.b)
        assert torch.equal(assigned.start.a, result.a)
        assert torch.equal(assigned.frozen.b, -result.b)
        assert torch.equal(assigned.frozen.a, result.a)


def test_one_who_never_took_part_begins_as_everyone_does_in_flora():
    state = merged(begun(x=2, y=3), x=factors(2))
    assert [KEEP.personal(state, client) for client in ("x", "y", "z")] == [True, False, False]
    new, plain = (
        KEEP.assign_own(state, "y", SITE, 3, 1.0, 5),
        FLoRA().assign_site(state, SITE, 3, 1.0, 5),
    )
    assert new.frozen is None
    assert not new.start.b.any()
    assert torch.equal(new.start.a, plain.start.a)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_at_another_rank_a_client_gets_a_prefix_or_fresh_rows_beside_its_own(rank):
    sent = factors(2)
    assigned = KEEP.assign_own(merged(begun(x=2), x=sent), "x", SITE, rank, 1.0, seed=3)
    start, same = assigned.start, min(rank, 2)
    assert start.rank == rank
    assert torch.equal(start.b[:, :same], sent.b[:, :same])
    assert torch.equal(start.a[:same], sent.a[:same])
    assert not start.b[:, 2:].any()
    fresh = FLoRA().assign_site(begun(x=2), SITE, rank, 1.0, 3).start.a
    assert torch.equal(start.a[2:], fresh[2:])
    assert distance(assigned.frozen.dense(), -start.dense()) == 0


def test_what_is_returned_last_is_kept_even_if_it_weighs_nothing_and_is_not_shared():
    one, two, assigned = factors(2, 1), factors(2, 2), SiteAssignment(factors(2, 3))
    given = (Contribution(w, assigned, r, c) for w, r, c in ((1.0, one, "x"), (0.0, two, "y")))
    state, _ = KEEP.merge_site(begun(x=2, y=2), SITE, given)
    assert torch.equal(state.tensors[f"{SITE}/kept/y/b"], two.b)
    assert state.tensors[f"{SITE}/kept/x/a"].data_ptr() != one.a.data_ptr()
    again = merged(state, x=factors(3, 9))
    assert torch.equal(again.tensors[f"{SITE}/kept/x/b"], factors(3, 9).b)
    assert torch.equal(again.tensors[f"{SITE}/kept/y/b"], two.b)
    assert torch.equal(state.tensors[f"{SITE}/kept/x/b"], one.b)  # the state before is as it was


@pytest.mark.parametrize("sent", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_was_really_sent_is_taken_off_whatever_its_dtype(sent):
    """A start that was rounded on its way: the increment is the one from what came out of it."""
    state = merged(begun(x=2), x=factors(2))
    start = factors(2).to(dtype=torch.bfloat16)
    assigned = SiteAssignment(start, LowRank(-start.b, start.a))
    result = factors(2, seed=4).to(dtype=sent)
    after, _ = KEEP.merge_site(state, SITE, iter([Contribution(1.0, assigned, result, "x")]))
    wide = torch.float64
    expected = factors(2).to(dtype=wide).dense() + result.to(dtype=wide).dense()
    expected -= start.to(dtype=wide).dense()
    kept = after.tensors[f"{SITE}/kept/x/b"].dtype
    assert kept == torch.promote_types(sent, torch.float32)
    # Products of float32 numbers, summed in float32.
    assert distance(KEEP.adapter(after)[SITE].matrix, expected) < (1e-6 if sent != wide else 1e-7)


def test_a_round_without_training_leaves_the_sum_bit_by_bit():
    sent = {"x": factors(2, 1).scale(1e4), "y": factors(3, 2)}
    state = merged(begun(x=2, y=3), **sent)
    again = merged(state, **sent)
    assert torch.equal(again.tensors[f"{SITE}/merged"], state.tensors[f"{SITE}/merged"])


def test_a_small_increment_is_not_lost_beside_a_large_start():
    """(B' − B)A' + B(A' − A) instead of B'A' − BA, in float32: no cancellation."""
    large, step = factors(2, 1).scale(1e3), factors(2, 2)
    small = LowRank(large.b, large.a + 1e-3 * step.a)
    assigned = SiteAssignment(large, LowRank(-large.b, large.a))
    state, _ = KEEP.merge_site(begun(x=2), SITE, iter([Contribution(1.0, assigned, small, "x")]))
    change = small.a.double() - large.a.double()
    assert distance(KEEP.adapter(state)[SITE].matrix, large.b.double() @ change) < 1e-6


def test_what_travels_down_is_the_start_and_never_its_negative_too():
    state = merged(begun(x=2, y=3), x=factors(2))
    own = assign(KEEP, state, {SITE: 2}, {SITE: 1.0}, 0, client="x")
    new = assign(KEEP, state, {SITE: 2}, {SITE: 1.0}, 0)
    assert own.frozen
    assert not new.frozen
    assert own.nbytes == new.nbytes == 4 * 2 * (14 + 11)
    tail = FlexLoRA("tail-in-base")
    cut, _ = play_round(
        tail, fresh_state(tail, SHAPE, fleet([2, 4])), fleet([2, 4]), noisy_training(0)
    )
    other = assign(tail, cut, {SITE: 2}, {SITE: 1.0}, 0)
    assert other.nbytes == other.start.nbytes + other.frozen.nbytes


def test_a_frozen_term_travels_unless_it_is_the_negative_bit_by_bit():
    start, other = factors(2, 1), factors(2, 2)
    negative = LowRank(-start.b, start.a)
    counted = [
        LowRank(-start.b, other.a),
        LowRank(-other.b, start.a),
        negative.to(dtype=torch.double),
    ]
    for frozen in (negative, *counted):
        one = Assignment(Adapter({SITE: start}), {SITE: 1.0}, Adapter({SITE: frozen}))
        more = 0 if frozen is negative else frozen.nbytes
        assert one.nbytes == start.nbytes + more
    elsewhere = Assignment(Adapter({SITE: start}), {SITE: 1.0}, Adapter({"other": negative}))
    assert elsewhere.nbytes == 2 * start.nbytes


def test_what_is_kept_lies_in_memory_as_it_will_after_a_resume():
    """Kernels may round differently on other strides."""
    sent = LowRank(torch.ones(2, 14).T, torch.ones(11, 2).T)
    state = merged(begun(x=2), x=sent)
    assert not sent.a.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in state.tensors.values())


def test_a_stack_holds_what_was_returned_and_what_it_began_with():
    shape = (200, 100)
    spec = FleetSpec({SITE: shape}, {"x": {SITE: 2}}, {SITE: 2}, 0)
    state = KEEP.init(spec)
    for expected in (1, 3, 5):
        assigned = KEEP.assign_own(state, "x", SITE, 2, 1.0, 0)
        sent = LowRank(assigned.start.b + 1, assigned.start.a)
        state, _ = KEEP.merge_site(state, SITE, iter([Contribution(1.0, assigned, sent, "x")]))
        state = KEEP.conclude(state, ["x"])
        assert KEEP.catch_up(state, "new") == expected * 4 * 2 * 300


def test_the_frozen_term_to_reckon_with_is_as_large_as_the_largest_client():
    ranks = {"x": {"q": 2}, "y": {"q": 5, "v": 1}}
    spec = FleetSpec({"q": SHAPE, "v": SHAPE}, ranks, {"q": 8, "v": 8}, 0)
    assert KEEP.frozen_ranks(spec) == {"q": 5, "v": 1}
    assert FLoRA().frozen_ranks(spec) == {}


@pytest.mark.parametrize("client", [ODD, "", "kept", "x/b", "a/kept/b", "\n\"'\\", "Ω" * 300])
def test_a_state_with_any_name_of_a_client_comes_back_from_disk(tmp_path, client):
    sent = factors(2, 5)
    state = merged(begun(**{client: 2, "x": 1}), **{client: sent, "x": factors(1)})
    storage.write_state(tmp_path, "s", state)
    got = storage.read_state(tmp_path, "s")
    assert got.scalars == json.loads(json.dumps(state.scalars))
    assert got.tensors.keys() == state.tensors.keys()
    one = KEEP.assign_own(got, client, SITE, 2, 1.0, 0)
    assert torch.equal(one.start.b, sent.b)
    assert torch.equal(one.start.a, sent.a)
    assert [*KEEP.adapter(got)] == [SITE]
    assert KEEP.catch_up(got, client) == KEEP.catch_up(state, client) > 0


def test_clients_that_were_sent_one_tensor_are_saved_apart(tmp_path):
    assigned = KEEP.assign_site(begun(x=2, y=2), SITE, 2, 1.0, 0)
    given = iter([Contribution(0.5, assigned, assigned.start, client) for client in "xy"])
    state, _ = KEEP.merge_site(begun(x=2, y=2), SITE, given)
    storage.write_state(tmp_path, "s", state)  # safetensors refuses tensors that share memory
    assert storage.read_state(tmp_path, "s").tensors.keys() == state.tensors.keys()


def test_what_makes_no_sense_is_refused_by_name():
    state = merged(begun(x=2), x=factors(2))
    with pytest.raises(RuleError, match="nobody's"):
        SLoRA(KEEP, 1)
    with pytest.raises(RankError, match="flora:keep: rank 12"):
        KEEP.assign_own(state, "x", SITE, 12, 1.0, 0)
    with pytest.raises(RuleError, match="flora:keep: scale 0"):
        KEEP.assign_own(state, "x", SITE, 2, 0.0, 0)
    bad = factors(2).scale(float("nan"))
    with pytest.raises(UpdateError, match="NaN"):
        merged(state, x=bad)


def test_one_adapter_for_all_split_clients_is_excluded_where_clients_differ():
    assert {"slora", "shared"} == KEEP.excludes.keys()
    assert "shared" not in FLoRA().excludes
    assert [*HetLoRA().excludes] == ["shared"]
    assert HetLoRA(gamma=1.0).excludes == {}


def test_flora_itself_keeps_nothing():
    clients = fleet([2, 4])
    state, _ = play_round(FLoRA(), fresh_state(FLoRA(), SHAPE, clients), clients, noisy_training(0))
    assert [*state.tensors] == [f"{SITE}/merged"]
    assert not FLoRA().personal(state, "0")
    assert FLoRA().assign_own(state, "0", SITE, 2, 1.0, 0).frozen is None
    other = State({**state.tensors, f"{SITE}/kept/0/b": torch.ones(14, 2)}, state.scalars)
    assert not KEEP.personal(other, "0")


def test_a_round_deals_own_factors_to_those_that_have_them_and_one_assignment_to_the_others():
    clients = {c: {SITE: 2} for c in "uvxy"}
    state = merged(begun(u=2, v=2, x=2, y=2), x=factors(2, 1), y=factors(2, 2))
    how = RoundSettings(KEEP, clients, dict.fromkeys(clients, 1.0), Scaling(), seed=0)
    round = Round(how, state, 1, 0, sorted(clients))
    assert round.assignment("u") is round.assignment("v")
    assert len({round.assignment_hash(c) for c in clients}) == 3
    assert len({id(round.assignment(c).merged) for c in clients}) == 1  # hashed once for all
    one = round.assignment("x")
    assert one.hash() != assign(KEEP, state, {SITE: 2}, {SITE: 1.0}, 0, client="y").hash()
    assert torch.equal(one.start[SITE].b, factors(2, 1).b)


def test_a_run_begins_at_the_sum_for_everyone_and_ends_in_the_same_bytes_when_resumed(tmp_path):
    run_settings = RunSettings(evaluation=federations.MEASURED, cohort=2)
    given = {"model": federations.one_block(), "rule": KEEP, "settings": run_settings}
    with federations.opened(tmp_path / "whole", **given) as run:
        records = list(run.rounds(4))
        whole = run.adapter.factors.hash()
    for record in records:
        server, own = record.evaluation["server"], record.evaluation["own_rank"]
        # The same function, but for the rounding of start and its negative in float32.
        assert own["all"]["loss"] == pytest.approx(server["seen"]["loss"], rel=1e-4)
    with federations.opened(tmp_path / "parts", **given) as run:
        list(run.rounds(2))
    with federations.opened(tmp_path / "parts", **given, resume=True) as run:
        list(run.rounds(4))
        assert run.adapter.factors.hash() == whole
    plain = {**given, "rule": FLoRA()}
    with federations.opened(tmp_path / "plain", **plain) as run:
        list(run.rounds(4))
        assert run.adapter.factors.hash() != whole


def test_the_option_is_stored_with_a_run_only_where_it_is_set():
    """So that a folder of `flora` looks as it did before there was one."""
    with federations.opened() as run:
        about = (run.fleet, run.local, run.settings, 1)
    assert setup.described(FLoRA(), *about)["options"] == {}
    assert setup.described(KEEP, *about)["options"] == {"reinitialise": False}
