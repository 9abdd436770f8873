"""The record of a round."""

import json
from dataclasses import replace

import pytest

from polyrank.errors import RunError
from polyrank.rounds.messages import RejectedUpdate
from polyrank.run import RoundRecord
from polyrank.run.records import last_losses
from record_samples import record


def test_a_record_tells_of_the_attempt_that_succeeded_and_counts_what_all_cost():
    made = record()
    assert (made.round, made.attempt, made.clients) == (4, 1, ["a", "b", "d"])
    assert made.ranks == {"T1": 2, "T2": 1}
    assert made.loss == pytest.approx((1.0 * 30 + 3.0 * 10) / 40)
    assert (made.bytes_down, made.bytes_up, made.tokens) == (200, 120, 30)
    assert (made.wire_down, made.wire_up, made.cuts) == (60, 40, {"2": 1, "whole": 2})
    assert made.rejected == {"d": "rank 1"}
    assert made.abandoned == [{"b": "late", "c": "NaN"}]
    assert made.discarded == pytest.approx(2 / 8)
    assert list(made.energy) == ["q", "v"]


def test_a_record_is_json_and_comes_back():
    made = record()
    assert RoundRecord.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises(RunError, match="expected records of schema 1, got 2"):
        RoundRecord.from_json({**made.to_json(), "schema": 2, "new": 0})


def test_a_record_of_before_there_were_cuts_can_be_read():
    found = record().to_json()
    for name in ("cuts", "wire_up", "wire_down"):
        del found[name]
    read = RoundRecord.from_json(found)
    assert (read.cuts, read.wire_up, read.wire_down) == ({}, 0, 0)
    assert (read.bytes_up, read.ranks) == (120, {"T1": 2, "T2": 1})


def test_a_record_has_the_rejections_of_all_attempts():
    made = record()
    assert made.turned_away == [
        {"client": "c", "kind": "invalid", "reason": "NaN"},
        {"client": "b", "kind": "late", "reason": "late"},
        {"client": "d", "kind": "invalid", "reason": "rank 1"},
    ]
    assert made.late == ["b"]
    assert made.clipped == {"a": 0.25}, "b's whole way counts"


def test_a_record_tells_the_bytes_of_all_attempts_per_client():
    made = record()
    assert made.traffic is not None
    assert [*made.traffic] == ["a", "b", "c", "d"]
    assert made.traffic["a"] == {"up": 120, "down": 200}
    for way, total in (("up", made.bytes_up), ("down", made.bytes_down)):
        assert sum(count[way] for count in made.traffic.values()) == total


NEW = ("turned_away", "clipped", "traffic", "losses", "loss_change")


def test_a_record_of_before_answers_were_counted_can_be_read():
    found = {name: value for name, value in record().to_json().items() if name not in NEW}
    read = RoundRecord.from_json(found)
    assert (read.turned_away, read.clipped, read.traffic, read.late) == ([], {}, None, [])
    assert (read.losses, read.loss_change) == ({}, None)
    assert read.rejected == {"d": "rank 1"}


def test_the_change_of_the_loss_is_that_of_the_same_clients():
    """In the round are a (loss 3) and b (loss 1); the round's mean hides who came."""
    assert record().losses == {"a": 3.0, "b": 1.0}
    assert record().loss_change is None, "neither has a round before"
    assert record(last_losses={"a": 4.0, "z": 9.0}).loss_change == pytest.approx(-1.0)
    assert record(last_losses={"a": 4.0, "b": 0.5}).loss_change == pytest.approx(-0.25)


def test_the_last_losses_are_those_of_each_clients_last_round():
    rounds = [{"losses": {"a": 3.0, "b": 2.0}}, {"losses": {"b": 1.0, "c": 4.0}}, {"round": 3}]
    assert last_losses(rounds) == {"a": 3.0, "b": 1.0, "c": 4.0}


def test_a_round_of_eighty_clients_has_a_line_of_modest_length():
    away = [RejectedUpdate.of(f"client-{i:05}", "invalid", "x" * 5000) for i in range(8)]
    full = replace(
        record(),
        clients=[f"client-{i:05}" for i in range(80)],
        traffic={f"client-{i:05}": {"up": 10**9, "down": 10**9} for i in range(80)},
        turned_away=[vars(one) for one in away],
        losses={f"client-{i:05}": 1 / 3 for i in range(80)},
    )
    assert len(json.dumps(full.to_json())) < 80 * 200


def test_a_record_is_one_line_for_people():
    line = str(record())
    assert "round 4: loss 1.5000" in line
    assert "2 clients" in line
    assert "discarded 25.00%" in line
    measured = record(evaluation={"server": {"seen": {"loss": 1.25}}, "own_rank": None})
    assert "validation 1.2500" in str(measured)
    assert "down 3.0 MiB (wire 2.0 MiB)" in str(
        record(bytes_down=3 * 2**20, wire_up=2**20, wire_down=2**20)
    )
    assert "wire" not in str(record(wire_up=0, wire_down=0))
    assert "trained before" not in line
    changed = str(record(last_losses={"a": 4.0}))
    assert "loss 1.5000 (-1.0000 for the clients that trained before)" in changed


def test_a_line_tells_the_perplexity_where_it_was_measured() -> None:
    measured = record(benchmark={"loss": 1.5, "perplexity": 4.48169})
    assert "perplexity 4.482" in str(measured)
    assert "perplexity" not in str(record())
    diverged = record(benchmark={"loss": None, "perplexity": None})
    assert "perplexity" not in str(diverged)
