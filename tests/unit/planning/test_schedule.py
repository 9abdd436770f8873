"""Types that change from round to round: by a trace, by a schedule in the recipe, by redrawing."""

from collections import Counter

import pytest
import torch

from federations import clients, one_block
from polyrank.aggregation import FlexLoRA
from polyrank.algebra import LowRank
from polyrank.config import read
from polyrank.config.trace import read_trace
from polyrank.errors import RankError, RecipeError
from polyrank.planning import Fleet, LoRAType, Redraw, Scaling, Trace
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.messages import AcceptedUpdate
from polyrank.rounds.round import Round
from polyrank.run import RunSettings, setup
from polyrank.training import Encoding, LocalTraining, prepare

TYPES = {name: LoRAType(name, {"all": rank}) for name, rank in (("low", 2), ("high", 16))}
RECIPE = """
[model]
source = "sample"
[data]
source = "sample"
[fleet]
distribution = "uniform"
"""


def test_a_change_holds_from_its_round_on():
    fleet = Fleet.table({"a": "high", "b": "low"}, types=TYPES)
    fleet = fleet.with_schedule(Trace({3: {"a": "low"}, 5: {"a": "high"}}))
    assert [fleet.at(round)["a"] for round in (1, 2, 3, 4, 5, 9)] == [
        *("high", "high", "low", "low", "high", "high")
    ]
    assert {fleet.at(round)["b"] for round in range(1, 9)} == {"low"}


def test_a_star_is_everyone_whom_the_round_does_not_name():
    fleet = Fleet.table(dict.fromkeys("abc", "high"), types=TYPES)
    changed = fleet.with_schedule(Trace({2: {"*": "low", "b": "high"}})).at(2)
    assert changed == {"a": "low", "b": "high", "c": "low"}


def test_a_redraw_keeps_the_counts_and_moves_the_types():
    names = [f"c{i}" for i in range(40)]
    fleet = Fleet.sample(names, {"low": 0.5, "high": 0.5}, types=TYPES)
    fleet = fleet.with_schedule(Redraw(3, seed=1))
    assert fleet.at(1) == fleet.at(3) == fleet.assigned
    periods = [fleet.at(round) for round in (1, 4, 7)]
    assert all(Counter(one.values()) == Counter(low=20, high=20) for one in periods)
    assert periods[0] != periods[1] != periods[2] != periods[0]
    assert fleet.at(4) == fleet.at(6)


def test_a_type_that_only_a_later_round_brings_counts_for_the_server_and_for_weakest():
    model, data = one_block(), clients()
    types = {name: LoRAType(name, {"all": rank}) for name, rank in (("one", 1), ("four", 4))}
    fleet = Fleet.table(dict.fromkeys([id for id in data if data[id].seen], "one"), types=types)
    changing = fleet.with_schedule(Trace({4: {"*": "four"}}))
    work, _ = prepare(data, model, Encoding())
    settings = setup.round_settings(FlexLoRA(), changing, model.spec, work, RunSettings())
    told = setup.fleet_spec(settings, changing, model.spec, None)
    assert set(told.server_rank.values()) == {4}
    assert set(settings.ranks_of("c1", 3).values()) == {1}
    assert set(settings.ranks_of("c1", 4).values()) == {4}
    assert changing.possible == ["four", "one"]
    assert set(changing.forced("weakest", model.spec).at(9).values()) == {"one"}
    first = setup.described(FlexLoRA(), fleet, LocalTraining(), RunSettings(), 1)["fleet"]
    assert (
        setup.described(FlexLoRA(), changing, LocalTraining(), RunSettings(), 1)["fleet"] != first
    )


def test_a_client_that_goes_from_rank_16_to_2_and_back_gets_back_what_it_had():
    """Under delta, with one client: rounds at rank 2 change nothing behind the second direction."""
    afforded = {1: 16, 2: 2, 3: 16}
    rule = FlexLoRA("delta")
    settings = RoundSettings(
        rule=rule,
        ranks={"a": {"q": 16}},
        weights={"a": 1.0},
        scaling=Scaling("fixed", 16.0),
        seed=0,
        ranks_in=lambda number: {"a": {"q": afforded[number]}},
    )
    spec = setup.FleetSpec({"q": (40, 30)}, settings.ranks, {"q": 16}, 0)
    state = rule.init(spec)
    draw = torch.Generator().manual_seed(0)
    seen = {}
    for number in (1, 2, 3):
        round = Round(settings, state, number, 0, ["a"])
        start = round.assignment("a").start["q"]
        assert start.rank == afforded[number]
        seen[number] = start
        if number == 3:
            break
        result = start
        if number == 1:  # It learns at rank 16; at rank 2 it only keeps what it has.
            result = LowRank(torch.randn(40, 16, generator=draw), start.a)
        state, _ = merged(round, result)
        if number == 1:
            learned = result.dense()
    assert torch.allclose(seen[2].dense(), best(learned, 2), atol=1e-4)
    assert torch.allclose(seen[3].dense(), learned, atol=1e-4)


def test_under_replace_the_same_way_loses_what_rank_2_cannot_hold():
    rule = FlexLoRA("replace")
    settings = RoundSettings(rule, {"a": {"q": 2}}, {"a": 1.0}, Scaling("fixed", 16.0), seed=0)
    spec = setup.FleetSpec({"q": (40, 30)}, settings.ranks, {"q": 16}, 0)
    d = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    tensors = {"q/u": u[:, :16], "q/s": s[:16], "q/v": vh[:16].T.contiguous()}
    round = Round(settings, rule.init(spec).update(tensors), 1, 0, ["a"])
    state, _ = merged(round, round.assignment("a").start["q"])
    after = rule.adapter(state)["q"].dense()
    assert torch.allclose(after, best(d, 2), atol=1e-4)
    assert not torch.allclose(after, best(d, 16), atol=1e-1)


def merged(round, result):
    round.accepted["a"] = AcceptedUpdate(1, 0, {})
    return round.aggregate(lambda client, site: result)


def best(d, rank):
    u, s, vh = torch.linalg.svd(d.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(d.dtype)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Trace({2: {"a": "hihg"}}), r"no LoRA type \['hihg'\]"),
        (Trace({2: {"alcie": "low"}}), r"no clients \['alcie'\]; did you mean 'alice'"),
    ],
)
def test_a_schedule_of_unknown_clients_or_types_is_refused(schedule, message):
    fleet = Fleet.table({"alice": "low", "a": "low"}, types=TYPES)
    with pytest.raises(RankError, match=message):
        fleet.with_schedule(schedule)


@pytest.mark.parametrize("bad", [lambda: Trace({0: {"a": "low"}}), lambda: Redraw(0, 0)])
def test_rounds_count_from_one(bad):
    with pytest.raises(RankError, match=r"from 1|1 round or more"):
        bad()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "round,client,type\n2,a,T1\n2,b,T4\n7,a,T4\n"),
        (
            "t.jsonl",
            '{"round": 2, "client": "a", "type": "T1"}\n\n'
            '{"round": 2, "client": "b", "type": "T4"}\n'
            '{"round": "7", "client": "a", "type": "T4"}\n',
        ),
    ],
)
def test_a_trace_is_csv_or_json_lines(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_trace(str(tmp_path / name)) == {2: {"a": "T1", "b": "T4"}, 7: {"a": "T4"}}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'round,client,type\n2,"a\u2028b\nc",T1\n'),
        ("t.jsonl", '{"round": 2, "client": "a\u2028b\\nc", "type": "T1"}\n'),
    ],
)
def test_a_clients_name_may_hold_what_else_ends_a_line(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_trace(str(tmp_path / name)) == {2: {"a\u2028b\nc": "T1"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("round,client\n2,a\n", r"line 2: expected round, client, type; \['type'\] missing"),
        ("round,client,type\n0,a,T1\n", "line 2: expected a round from 1 on, got '0'"),
        ("round,client,type\nx,a,T1\n", "line 2: expected a round from 1 on, got 'x'"),
        ("round,client,type\n2,a,T1\n2,a,T2\n", "line 3: round 2 names client 'a' twice"),
        ("round,client,type\n", "holds no change"),
    ],
)
def test_a_trace_that_cannot_be_meant_is_refused_by_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_trace(str(tmp_path / "t.csv"))


def recipe(tmp_path, *lines):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE + "\n".join(lines) + "\n")
    return path


def test_a_trace_is_found_beside_the_recipe_and_kept_in_the_resolved_one(tmp_path):
    (tmp_path / "t.csv").write_text("round,client,type\n2,*,T1\n")
    resolved = read(recipe(tmp_path, 'trace = "t.csv"')).resolved()
    (tmp_path / "t.csv").unlink()
    (tmp_path / "again.toml").write_text(resolved.to_toml())
    again = read(tmp_path / "again.toml")
    assert again == resolved
    assert again.fleet.schedule == {"2": {"*": "T1"}}
    assert set(again.fleet.build([f"c{i}" for i in range(8)], 0).at(2).values()) == {"T1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["redraw = 2", 'schedule = {2 = {a = "T1"}}'], r"\['redraw', 'schedule'\] each say"),
        (['schedule = {2 = {a = "T9"}}'], r"the schedule gives \['T9'\]"),
        (['trace = "nowhere.csv"'], r"nowhere\.csv cannot be read"),
        (["redraw = 0"], "fleet.redraw"),
        (['schedule = {two = {a = "T1"}}'], "numbers of rounds as keys, got 'two'"),
        (['schedule = {0 = {a = "T1"}}'], "rounds count from 1"),
    ],
)
def test_a_recipe_with_a_schedule_that_cannot_be_is_refused(tmp_path, lines, message):
    with pytest.raises(RecipeError, match=message):
        read(recipe(tmp_path, *lines))


@pytest.mark.parametrize(
    ("count", "shares", "message"),
    [
        (5, {"T1": 0.94, "T4": 0.06}, "6.00% of 5 clients leave no client for type T4"),
        (
            1,
            dict.fromkeys(["T1", "T2", "T3", "T4"], 0.25),
            r"no client for type T2 \(nor for \['T3', 'T4'\]\)",
        ),
        (3, {"T1": 0.5, "T2": 0.4}, "sum to 1"),
        (3, {"T1": 1.5, "T2": -0.5}, "at least 0"),
    ],
)
def test_shares_that_do_not_sum_to_one_or_leave_a_type_without_clients_are_refused(
    count, shares, message
):
    with pytest.raises(RankError, match=message):
        Fleet.sample([f"c{i}" for i in range(count)], shares)
