"""Every answer that is not aggregated is counted with its reason; bytes are told per client."""

from dataclasses import replace

import pytest
import torch

from polyrank.aggregation import FFA, FleetSpec, FlexLoRA, HetLoRA
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import UpdateError
from polyrank.rounds.clipping import clipped, moved
from polyrank.rounds.messages import Failure
from polyrank.rounds.round import Round
from round_samples import RANKS, SHAPES, WIRED, answer, begin, bytes_at, divided, settings, spoiled

NAN = spoiled(float("nan"))


def kinds(round: Round) -> list[tuple[str, str]]:
    return [(one.client, one.kind) for one in round.rejections]


def refused(round: Round, update, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        round.accept(update)


def test_an_accepted_update_is_not_among_the_rejections():
    round = begin()
    update = answer(round, "a")
    assert round.accept(update) is update
    assert round.rejections == []


def test_each_kind_of_answer_is_counted_with_its_reason():
    round = begin()
    round.accept(answer(round, "a"))
    refused(round, answer(round, "a"), "accepted already")
    refused(round, NAN(answer(round, "b")), "NaN or infinite")
    refused(round, replace(answer(round, "b"), round=1), "it answers round 1")
    refused(round, replace(answer(round, "b"), attempt=3), "attempt 3")
    refused(round, replace(answer(round, "b"), client="x"), "not asked")
    for client, kind in (("b", "late"), ("c", "lost"), ("d", "refused"), ("d", "failed")):
        round.fail(Failure(client, 2, 0, f"was {kind}", kind=kind))
    assert kinds(round) == [
        ("a", "duplicate"),
        ("b", "invalid"),
        ("b", "stale"),
        ("b", "stale"),
        ("x", "invalid"),
        ("b", "late"),
        ("c", "lost"),
        ("d", "refused"),
        ("d", "failed"),
    ]
    assert "'b' in round 2: NaN or infinite" in round.rejections[1].reason
    assert round.rejected == {"b": "was late", "c": "was lost", "d": "was failed"}
    assert list(round.accepted) == ["a"]


def test_a_failure_is_a_failed_one_unless_it_says_otherwise():
    round = begin()
    round.fail(Failure("a", 2, 0, "its loss was NaN"))
    assert kinds(round) == [("a", "failed")]


@pytest.mark.parametrize("change", [{"round": 1}, {"attempt": 1}])
def test_a_stale_answer_says_nothing_of_a_client_that_is_still_awaited(change):
    round = begin()
    refused(round, replace(answer(round, "b"), **change), "it is not aggregated")
    assert round.rejected == {}
    with pytest.raises(UpdateError, match="it answers"):
        round.fail(replace(Failure("c", 2, 0, "?"), **change))
    assert round.rejected == {}
    round.reject_stale(replace(answer(round, "d"), **change))
    round.reject_stale(replace(Failure("a", 2, 0, "?"), **change))
    assert round.rejected == {}
    assert kinds(round) == [(client, "stale") for client in "bcda"]
    for client in "abcd":
        round.accept(answer(round, client))
    assert list(round.accepted) == ["a", "b", "c", "d"]


def test_a_stale_answer_does_not_overwrite_why_a_client_has_no_update():
    round = begin()
    refused(round, NAN(answer(round, "b")), "NaN")
    refused(round, replace(answer(round, "b"), round=1), "it answers round 1")
    assert "NaN" in round.rejected["b"]


def test_a_failure_after_the_update_was_accepted_takes_nothing_away():
    round = begin()
    round.accept(answer(round, "a"))
    with pytest.raises(UpdateError, match="accepted already"):
        round.fail(Failure("a", 2, 0, "too late to say no", kind="late"))
    assert (list(round.accepted), round.rejected) == (["a"], {})
    assert kinds(round) == [("a", "duplicate")]


def test_who_answers_an_earlier_round_need_not_take_part_in_this_one():
    round = begin(clients=("a", "b"))
    round.reject_stale(replace(answer(round, "a"), client="d", round=1))
    assert kinds(round) == [("d", "stale")]


def test_long_reasons_are_shortened():
    round = begin()
    round.fail(Failure("a", 2, 0, "because " * 100))
    assert len(round.rejections[0].reason) == 300
    assert round.rejections[0].reason.endswith("…")


# --- bytes ---


def summed(round: Round) -> tuple[int, int]:
    counts = round.traffic.values()
    return sum(count["up"] for count in counts), sum(count["down"] for count in counts)


def test_bytes_per_client_sum_to_those_of_the_round():
    round = begin()
    one = {client: answer(round, client).adapter.nbytes for client in "abcd"}
    round.accept(answer(round, "a"))
    refused(round, answer(round, "a"), "accepted already")
    refused(round, NAN(answer(round, "b")), "NaN")
    round.reject_stale(replace(answer(round, "c"), round=1))
    refused(round, replace(answer(round, "d"), client="x"), "not asked")
    down = {client: round.assignment(client).nbytes for client in "abcd"}
    assert round.traffic == {
        "a": {"up": 2 * one["a"], "down": down["a"]},
        "b": {"up": one["b"], "down": down["b"]},
        "c": {"up": one["c"], "down": down["c"]},
        "d": {"up": 0, "down": down["d"]},
        "x": {"up": one["d"], "down": 0},
    }
    assert summed(round) == (round.bytes_up, round.bytes_down)


def test_bytes_of_split_clients_hold_what_crossed_their_cuts():
    round = begin(divided(), ("a", "b", "d"))
    round.accept(answer(round, "a", metrics=WIRED))
    failed = Failure("b", 2, 0, "diverged", {"wire_up": 5, "wire_down": 3})
    round.fail(failed)
    round.fail(failed)
    own = bytes_at(round.assignment("a").start, "q")
    assert round.traffic["a"] == {"up": own + 1000, "down": own + 700}
    assert round.traffic["b"] == {
        "up": 5,
        "down": bytes_at(round.assignment("b").start, "v") + 3,
    }
    assert summed(round) == (round.bytes_up, round.bytes_down)


def test_what_a_stale_answer_says_of_a_cut_is_not_taken_for_this_round():
    round = begin(divided(), ("a",))
    stale = replace(answer(round, "a", metrics={**WIRED, "wire_up": 5.0}), round=1)
    refused(round, stale, "it answers round 1")
    assert (round.wire_up, round.wire_down) == (0, 0)
    round.accept(answer(round, "a", metrics=WIRED))
    assert (round.wire_up, round.wire_down) == (1000, 700)


# --- updates that are shortened ---


def far(round: Round, client: str):
    """An update that moved ten times as far as `answer`."""
    start = round.assignment(client).start
    near = answer(round, client)
    return replace(
        near,
        adapter=Adapter(
            {
                s: LowRank(d.b + 10 * (near.adapter[s].b - d.b), near.adapter[s].a)
                for s, d in start.items()
            }
        ),
    )


@pytest.mark.parametrize("rule", [FlexLoRA(), FlexLoRA("delta"), HetLoRA()])
def test_a_long_update_counts_shortened_to_the_bound_and_a_short_one_as_it_is(rule):
    chosen = settings(rule)
    open_ended = begin(chosen)
    updates = {c: far(open_ended, c) if c == "b" else answer(open_ended, c) for c in "abcd"}
    bound = 1.01 * max(
        moved(updates[c].adapter, open_ended.assignment(c)) for c in "abcd" if c != "b"
    )
    assert moved(updates["b"].adapter, open_ended.assignment("b")) > bound
    round = begin(replace(chosen, clip_increment=bound))
    for update in updates.values():
        assert round.accept(update) is update, "what is kept is what came"
    factors = {client: receipt.clipped for client, receipt in round.accepted.items()}
    assert 0 < factors.pop("b") < 1
    assert set(factors.values()) == {1.0}
    seen: dict[str, dict] = {client: {} for client in "abcd"}
    merge = type(rule).merge_site

    def watched(self, state, site, contributions):
        taken = list(contributions)
        for one in taken:
            seen[one.client][site] = one.result
        return merge(self, state, site, iter(taken))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rule), "merge_site", watched)
        round.aggregate(lambda client, site: updates[client].adapter[site])
    for client in "acd":
        assert all(seen[client][s] is updates[client].adapter[s] for s in seen[client])
    length = moved(Adapter(seen["b"]), round.assignment("b"))
    assert length == pytest.approx(bound, rel=1e-5)  # float32 factors
    assert length <= bound


def test_a_rule_that_weighs_by_norm_weighs_what_counts():
    chosen = settings(HetLoRA(), clip_increment=0.05)
    round = begin(chosen)
    updates = {client: far(round, client) for client in "ab"}
    for update in updates.values():
        round.accept(update)
    norms = {}

    def weigh(self, state, weights, norm):
        norms.update({client: norm(client) for client in weights})
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HetLoRA, "weigh", weigh)
        round.aggregate(lambda client, site: updates[client].adapter[site])
    for client in "ab":
        assigned = round.assignment(client).start.norm()
        assert norms[client] <= assigned + 0.05 + 1e-9
        assert updates[client].adapter.norm() > assigned + 0.05


def test_what_came_is_refused_before_it_is_shortened():
    round = begin(settings(max_increment=1.0, clip_increment=0.5))
    refused(round, far(round, "b"), "more than max_increment = 1.0")
    assert kinds(round) == [("b", "invalid")]


def test_an_update_beyond_all_numbers_is_refused_where_it_would_be_shortened():
    round = begin(settings(clip_increment=0.5))
    update = answer(round, "b")
    huge = update.adapter.to(dtype=torch.float64).scale(1e200)
    refused(round, replace(update, adapter=huge), "'b' in round 2: .*too large to be measured")
    assert list(round.rejected) == ["b"]


def test_an_update_validated_again_after_a_kill_is_shortened_the_same():
    chosen = settings(clip_increment=0.3)
    round = begin(chosen)
    kept = {client: round.accept(far(round, client)) for client in "abcd"}
    again = Round(chosen, round.state, 2, 0, list("abcd"))
    for update in kept.values():
        again.accept(update)
    assert again.accepted == round.accepted
    assert again.accepted["a"].clipped < 1
    assert again.traffic == round.traffic
    one, other = (
        r.aggregate(lambda client, site: kept[client].adapter[site])[0].tensors
        for r in (round, again)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fixed_a_stays_as_sent_where_b_is_shortened():
    chosen = settings(FFA(), clip_increment=0.1)
    round = Round(chosen, FFA().init(FleetSpec(SHAPES, RANKS, {"q": 3, "v": 2}, 0)), 2, 0, ["b"])
    start = round.assignment("b").start
    update = replace(
        answer(round, "b"), adapter=Adapter({s: LowRank(d.b + 1, d.a) for s, d in start.items()})
    )
    round.accept(update)
    factor = round.accepted["b"].clipped
    assert 0 < factor < 1
    found, again = clipped(update, round.assignment("b"), 0.1)
    assert again == factor
    assert all(torch.equal(found.adapter[s].a, start[s].a) for s in start)


# --- weights that are capped ---


def weighed(round: Round) -> dict[str, dict[str, float]]:
    """The weight per site and client with which all clients' updates are merged."""
    updates = {client: answer(round, client) for client in round.clients}
    for update in updates.values():
        round.accept(update)
    found: dict[str, dict[str, float]] = {}
    kind = type(round.settings.rule)
    merge = kind.merge_site

    def watched(self, state, site, contributions):
        taken = list(contributions)
        found[site] = {one.client: one.weight for one in taken}
        return merge(self, state, site, iter(taken))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "merge_site", watched)
        round.aggregate(lambda client, site: updates[client].adapter[site])
    return found


HEAVY = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 94.0}


def test_no_client_weighs_more_than_its_share_at_any_site():
    plain = weighed(begin(settings(weights=HEAVY)))
    assert plain["q"] == pytest.approx({"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.94})
    found = weighed(begin(settings(weights=HEAVY, max_share=0.4)))
    assert found["q"] == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    # Without d, who does not train v: 1, 2 and 3 of 6; c is cut from a half.
    assert found["v"] == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.4})


def test_a_cap_that_binds_nobody_changes_no_weight():
    assert weighed(begin(settings(weights=HEAVY, max_share=0.95))) == weighed(
        begin(settings(weights=HEAVY))
    )


def test_clients_too_few_for_the_cap_weigh_equally():
    found = weighed(begin(settings(weights=HEAVY, max_share=0.1)))
    assert found["q"] == pytest.approx(dict.fromkeys("abcd", 0.25))
    assert found["v"] == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_a_rule_that_weighs_by_norm_is_capped_too():
    found = weighed(begin(settings(HetLoRA(), max_share=0.26)))
    plain = weighed(begin(settings(HetLoRA())))
    assert max(plain["q"].values()) > 0.27
    assert max(found["q"].values()) <= 0.26 * (1 + 1e-9)
