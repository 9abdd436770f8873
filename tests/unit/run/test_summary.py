"""The summary of a run, made of its records and evaluations."""

import json
from dataclasses import replace

import pytest

from polyrank.run import RoundRecord
from polyrank.run.summary import (
    before_and_after,
    participation,
    summary,
    to_target,
    to_target_perplexity,
)
from record_samples import record

NEW = ("turned_away", "clipped", "traffic", "losses", "loss_change")


def told(loss, number):
    evaluation = None if loss == "none" else {"server": {"seen": {"loss": loss}}}
    return record(round=number, evaluation=evaluation).to_json()


def test_participation_counts_what_each_client_did_in_all_rounds():
    kept = replace(record(), clients=["a", "d"], rejected={}, turned_away=[], round=5)
    found = participation(iter([record().to_json(), kept.to_json()]))
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
    found = participation([made.to_json()])["a"]
    for name in ("refused", "late", "lost"):
        assert found[name] == (name == counted)


def test_participation_of_records_of_before_says_what_they_say():
    old = {name: value for name, value in record().to_json().items() if name not in NEW}
    found = participation([old, record().to_json()])
    assert found["a"]["rounds_joined"] == 2
    assert {one["bytes_up"] for one in found.values()} == {None}
    assert [found[client]["refused"] for client in "abcd"] == [0, 1, 2, 2]
    assert participation(map(vars, map(RoundRecord.from_json, [old])))["c"]["refused"] == 1


def test_texts_before_and_after_are_of_the_same_prompt():
    asked = {"client": "a", "prompt": "say", "input": "w1", "references": ["w1"]}
    base = [{**asked, "input": "w2", "text": "no"}, {**asked, "text": "w7"}]
    final = [{**asked, "text": "w1"}]
    (told,) = before_and_after(base, final)
    assert told == {**asked, "before": "w7", "after": "w1"}
    assert before_and_after([], final)[0]["before"] is None, "a base of an earlier version"


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
