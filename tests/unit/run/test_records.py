"""Records and the summary that is made of them."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest

from polyrank.aggregation import SiteReport
from polyrank.errors import RunError
from polyrank.rounds.messages import AcceptedUpdate, RejectedUpdate
from polyrank.run import RoundRecord
from polyrank.run.records import attendance, summary, to_target, to_target_perplexity

KINDS = {"b": "late"}
CLIPPED = {"a": 0.25, "b": 1.0}
SECONDS = {"train": 1.0, "merge": 0.5, "evaluate": 0.5, "total": 2.0}


class Attempt:
    """As much of a round as a record asks for."""

    number, bytes_down, bytes_up = 4, 100, 60
    wire_down, wire_up = 30, 20
    cuts: ClassVar = {"2": 1, "whole": 2}

    def __init__(self, attempt, accepted, rejected):
        self.attempt, self.rejected = attempt, rejected
        self.clients = sorted([*accepted, *rejected])
        self.turned_away = [
            RejectedUpdate(c, KINDS.get(c, "invalid"), rejected[c]) for c in rejected
        ]
        each = {client: {"up": 0, "down": 0} for client in self.clients}
        self.traffic = {**each, "a": {"up": 60, "down": 100}}
        self.accepted = {
            client: AcceptedUpdate(
                1, 0, {"loss": loss, "tokens": 10.0, "target_tokens": targets}, {}, CLIPPED[client]
            )
            for client, (loss, targets) in accepted.items()
        }


def record(**changes) -> RoundRecord:
    attempts = [
        Attempt(0, {"a": (9.0, 1.0)}, {"c": "NaN", "b": "late"}),
        Attempt(1, {"b": (1.0, 30.0), "a": (3.0, 10.0)}, {"d": "rank 1"}),
    ]
    types = {"a": "T1", "b": "T2", "c": "T1", "d": "T1"}
    reports = {"v": SiteReport(3.0, 1.0), "q": SiteReport(5.0, 1.0)}
    return replace(RoundRecord.of(attempts, types, reports, None, SECONDS), **changes)


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


def test_a_record_tells_who_was_turned_away_in_all_attempts():
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


NEW = ("turned_away", "clipped", "traffic")


def test_a_record_of_before_answers_were_counted_can_be_read():
    found = {name: value for name, value in record().to_json().items() if name not in NEW}
    read = RoundRecord.from_json(found)
    assert (read.turned_away, read.clipped, read.traffic, read.late) == ([], {}, None, [])
    assert read.rejected == {"d": "rank 1"}


def test_a_round_of_eighty_clients_has_a_line_of_modest_length():
    away = [RejectedUpdate.of(f"client-{i:05}", "invalid", "x" * 5000) for i in range(8)]
    full = replace(
        record(),
        clients=[f"client-{i:05}" for i in range(80)],
        traffic={f"client-{i:05}": {"up": 10**9, "down": 10**9} for i in range(80)},
        turned_away=[vars(one) for one in away],
    )
    assert len(json.dumps(full.to_json())) < 12_000


# --- what clients did ---


def test_attendance_counts_what_each_client_did_in_all_rounds():
    kept = replace(record(), clients=["a", "d"], rejected={}, turned_away=[], round=5)
    found = attendance(iter([record().to_json(), kept.to_json()]))
    nothing = dict.fromkeys(("rounds_joined", "bytes_up", "bytes_down"), 0)
    assert found == {
        "a": {
            **{"rounds_joined": 2, "bytes_up": 240, "bytes_down": 400},
            **{"refused": 0, "late": 0, "lost": 0},
        },
        "b": {**nothing, "rounds_joined": 1, "refused": 0, "late": 1, "lost": 0},
        "c": {**nothing, "refused": 1, "late": 0, "lost": 0},
        "d": {**nothing, "rounds_joined": 1, "refused": 1, "late": 0, "lost": 0},
    }


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("invalid", "refused"),
        ("failed", "refused"),
        ("refused", "refused"),
        ("late", "late"),
        ("lost", "lost"),
        ("stale", None),
        ("duplicate", None),
    ],
)
def test_each_kind_counts_as_one_thing(kind, counted):
    made = replace(record(), turned_away=[{"client": "a", "kind": kind, "reason": ""}])
    found = attendance([made.to_json()])["a"]
    for name in ("refused", "late", "lost"):
        assert found[name] == (name == counted)


def test_attendance_of_records_of_before_says_what_they_say():
    old = {name: value for name, value in record().to_json().items() if name not in NEW}
    found = attendance([old, record().to_json()])
    assert found["a"]["rounds_joined"] == 2
    assert {one["bytes_up"] for one in found.values()} == {None}
    assert [found[client]["refused"] for client in "abcd"] == [0, 1, 2, 2]
    assert attendance(map(vars, map(RoundRecord.from_json, [old])))["c"]["refused"] == 1


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


def told(loss, number):
    evaluation = None if loss == "none" else {"server": {"seen": {"loss": loss}}}
    return record(round=number, evaluation=evaluation).to_json()


def test_the_target_counts_everything_up_to_the_round_that_reached_it():
    records = [told("none", 1), told(3.0, 2), told(None, 3), told(2.0, 4), told(1.0, 5)]
    assert to_target(records, 2.0) == {"loss": 2.0, "rounds": 4, "bytes": 4 * 320, "seconds": 8.0}
    assert to_target(records, 0.5) == {"loss": 0.5, "rounds": None, "bytes": None, "seconds": None}
    assert to_target(records, None) is None


def test_the_target_perplexity_counts_the_same_and_the_modelled_seconds() -> None:
    found: list[float | None] = [None, 9.0, None, 5.0, 4.0]
    records = [
        record(
            round=number,
            benchmark=None if value is None else {"loss": 1.0, "perplexity": value},
            modelled_seconds=2.0 * number,
        ).to_json()
        for number, value in enumerate(found, start=1)
    ]
    spent = {"rounds": 4, "bytes": 4 * 320, "seconds": 8.0, "modelled_seconds": 20.0}
    assert to_target_perplexity(records, 5.0) == {"perplexity": 5.0, **spent}
    records[1]["modelled_seconds"] = None
    without = to_target_perplexity(records, 5.0)
    assert without is not None
    assert without["modelled_seconds"] is None
    assert to_target_perplexity(records, None) is None
    never = to_target_perplexity(records, 3.0)
    assert never == {"perplexity": 3.0, **dict.fromkeys(spent)}
    del records[0]["benchmark"]  # A record of before there were any.
    assert to_target_perplexity(records, 5.0) == without


def test_a_line_tells_the_perplexity_where_it_was_measured() -> None:
    measured = record(benchmark={"loss": 1.5, "perplexity": 4.48169})
    assert "perplexity 4.482" in str(measured)
    assert "perplexity" not in str(record())
    diverged = record(benchmark={"loss": None, "perplexity": None})
    assert "perplexity" not in str(diverged)


def test_a_summary_holds_what_readers_rely_on():
    group = {"loss": 1.0, "loss_se": 0.1, "exact_match": 0.5, "rouge_l": 0.6, "clients": 3}
    scores = {"seen": group, "unseen": {**group, "loss": 2.0}, "per_category": {"a": {}}}
    before = {k: v for k, v in told(1.0, 2).items() if not k.startswith("wire")}
    made = summary(
        method="flexlora",
        records=[told(1.0, 1), before],
        base=scores,
        final={**scores, "clients": {"many": 1}},
        target=None,
        stopped=None,
        result_round=2,
        adapter_lost=0.25,
    )
    assert {"schema", "method", "rounds", "seconds", "tokens", "bytes_up", "bytes_down"} <= set(
        made
    )
    assert (made["rounds"], made["tokens"], made["bytes_up"], made["seconds"]) == (2, 60, 240, 4.0)
    assert (made["wire_up"], made["wire_down"]) == (40, 60)
    for when in ("base", "final"):
        for who in ("seen", "unseen"):
            assert {"loss", "exact_match", "rouge_l"} <= set(made[when][who])
    assert made["per_category"] == {"a": {}}
    assert "benchmark" not in made
    assert made["clients"]["b"]["rounds_joined"] == 2
    assert made["clients"]["a"]["bytes_up"] == 240
    json.dumps(made, allow_nan=False)


def test_a_summary_tells_of_the_benchmark_without_the_texts() -> None:
    group = {"loss": 1.0, "loss_se": 0.1, "exact_match": 0.5, "rouge_l": 0.6, "clients": 3}
    scores = {"seen": group, "unseen": group, "per_category": {}}
    base, final = ({"perplexity": value, "texts": [{"text": "long"}]} for value in (9.0, 4.0))
    made = summary(
        method="flora",
        records=[record(benchmark={"loss": 1.4, "perplexity": 4.0}).to_json()],
        base={**scores, "benchmark": base},
        final={**scores, "benchmark": final},
        target=None,
        target_perplexity=4.5,
        stopped=None,
        result_round=1,
        adapter_lost=0.0,
    )
    assert made["benchmark"] == {"base": {"perplexity": 9.0}, "final": {"perplexity": 4.0}}
    assert made["to_target_perplexity"]["bytes"] == 320
