"""Whole runs with split clients: the same as without a cut, whatever the rule and the cut."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from federations import QUIET, SITES, clients, opened
from models import tiny_loaded
from polyrank.aggregation import RULES, SLoRA
from polyrank.algebra import Adapter, Delta, LowRank, distance
from polyrank.config.reading import SHIPPED
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.planning.schedule import Trace
from polyrank.run import RoundRecord, RunSettings
from polyrank.training import LocalTraining
from polyrank.training.split import SplitSettings
from runs import lines_with, polyrank
from splits import (
    BLOCKS,
    CUTS,
    EXACT,
    LOCAL,
    UNEQUAL,
    assert_same,
    carried_out,
    fleet,
    model,
    size,
    watched,
    whole,
)

# --- every rule ---


@pytest.mark.parametrize("cuts", ["split", "mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_split_clients_end_with_the_adapter_of_whole_ones_under_every_rule(
    rule: str, cuts: str
) -> None:
    split, other = carried_out(RULES[rule], CUTS[cuts]), whole(RULES[rule])
    assert_same(split, other)
    if cuts == "mixed" or rule == "hetlora":  # which prunes some matrices more than others
        return
    # Cut in the middle of four equal blocks, they download and upload half of the factors.
    for mine, its in zip(split.records, other.records, strict=True):
        assert (its.wire_up, its.wire_down, its.cuts) == (0, 0, {"whole": 3})
        assert mine.cuts == {"2": 3}
        assert 2 * (mine.bytes_up - mine.wire_up) == its.bytes_up
        assert 2 * (mine.bytes_down - mine.wire_down) == its.bytes_down


@pytest.mark.parametrize("rule", [name for name in RULES if "slora" not in RULES[name].excludes])
def test_sparse_rounds_of_slora_go_across_the_cut(rule: str) -> None:
    made = SLoRA(RULES[rule], 2)
    assert_same(carried_out(made, CUTS["mixed"]), whole(made))


@pytest.mark.parametrize("rule", ["flexlora:delta", "hetlora", "flora", "full"])
def test_fedprox_and_sgd_go_across_the_cut(rule: str) -> None:
    for local in (
        replace(LOCAL, proximal=0.5),
        replace(LOCAL, optimizer="sgd", momentum=0.9, lr=0.2),
    ):
        split = carried_out(RULES[rule], CUTS["mixed"], local=local)
        assert_same(split, whole(RULES[rule], local))


def test_the_comparison_sees_another_seed() -> None:
    """The runs above move far more than they differ."""
    rule = RULES["flexlora:delta"]
    one, other = whole(rule), carried_out(rule, CUTS["mixed"], seed=1)
    assert size(one.adapter) > 0.1
    far = sum(distance(one.adapter[s], other.adapter[s]) ** 2 for s in one.adapter) ** 0.5
    assert far > 0.01


# --- every cut ---

EVERY = (CutPoint(1), CutPoint(2), CutPoint(3), CutPoint(1, 2), CutPoint(1, 3), CutPoint(2, 3))


@pytest.mark.parametrize("cut", EVERY, ids=str)
def test_every_cut_gives_the_run_without_one(cut: CutPoint) -> None:
    rule = RULES["flora"]
    split = carried_out(rule, dict.fromkeys("abcd", cut))
    assert_same(split, whole(rule))
    assert all(record.cuts == {str(cut): 3} for record in split.records)


@pytest.mark.parametrize(
    ("wire", "losses", "adapters"),
    [
        # Measured over all cuts: losses 4e-8, adapters 8e-7. Float32 rounds at 6e-8.
        ("float32", 1e-6, (0.0, 1e-5)),
        # Measured: losses 3e-4, adapters 16 %. The wire rounds at 4e-3, and AdamW's first steps,
        # which take the gradient's sign, turn what was almost nothing; so the loss hardly moves.
        ("bf16", 3e-3, (1e-3, 0.5)),
        # Measured: losses 5e-4, adapters 19 %: activations off by up to 1/254 of a token's largest.
        ("int8", 3e-3, (1e-3, 0.5)),
    ],
)
def test_in_float32_every_cut_gives_the_losses_of_the_run_without_one(
    wire: str, losses: float, adapters: tuple[float, float]
) -> None:
    rule = RULES["flora"]
    other = whole(rule, dtype=torch.float32)
    for cut in EVERY:
        settings = replace(EXACT, wire=wire)
        split = carried_out(rule, dict.fromkeys("abcd", cut), dtype=torch.float32, split=settings)
        for mine, its in zip(split.records, other.records, strict=True):
            assert mine.loss == pytest.approx(its.loss, rel=losses), cut
        far = max(
            distance(split.adapter[site], delta) / delta.norm()
            for site, delta in other.adapter.items()
        )
        assert adapters[0] <= far <= adapters[1], f"{cut}: a lossy wire differs, within bounds"


# --- rounds ---


@pytest.mark.parametrize("rule", ["flora", "flexlora:tail-in-base"])
def test_a_client_may_be_split_in_one_round_and_whole_in_the_next(rule: str) -> None:
    changes = Trace({2: {"c0": "d", "c3": "c"}, 3: {"c1": "d", "c0": "b"}})
    cuts = {"a": CutPoint(2), "b": CutPoint(1), "c": CutPoint(1, 3)}
    mixed, uncut = (fleet(UNEQUAL, one).with_schedule(changes) for one in (cuts, {}))
    split = carried_out(RULES[rule], mixed, number=5)
    assert [record.cuts for record in split.records] == [
        {"1": 1, "1–3": 1, "2": 2, "whole": 1},
        {"1": 1, "1–3": 2, "2": 1, "whole": 1},
        {"1": 1, "1–3": 2, "2": 1, "whole": 1},
    ]
    assert_same(split, carried_out(RULES[rule], uncut, number=5))


def test_every_round_begins_anew_at_both_ends() -> None:
    """FLoRA sends A drawn anew and B = 0, at the client's sites as at the server's."""
    run = carried_out(RULES["flora"], CUTS["mixed"])
    assert {task.cut for task in run.tasks} == {CutPoint(1), CutPoint(3), CutPoint(1, 3), None}
    for task in run.tasks:
        assert task.assignment.start.keys() == model().spec.shapes.keys()
        assert all(not delta.b.any() for delta in factors(task.assignment.start).values())
        assert all(delta.a.any() for delta in factors(task.assignment.start).values())
    first, second = [task for task in run.tasks if task.client == "c1"][:2]
    assert first.round < second.round
    assert first.assignment.start.hash() != second.assignment.start.hash()
    for update in run.updates:
        assert all(delta.b.any() for delta in factors(update.adapter).values()), "both ends trained"


def factors(adapter: Adapter[Delta]) -> dict[str, LowRank]:
    return {site: delta for site, delta in adapter.items() if isinstance(delta, LowRank)}


# --- what travels ---

FRAME = 60
"""Bytes of a frame's head and checksum; the client's name comes on top."""


@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 3)], ids=str)
def test_the_bytes_of_a_split_run_are_those_of_its_tokens_and_its_own_factors(
    cut: CutPoint,
) -> None:
    data = clients(seen=2, unseen=0, examples=16)
    wide = tiny_loaded(
        "llama", num_hidden_layers=BLOCKS, hidden_size=256, sites=SITES, dtype=torch.float32
    )
    kinds = {"a": LoRAType("a", {"all": 3})}
    who = Fleet.table(dict.fromkeys(data, "a"), types=kinds, cuts={"a": cut})
    made = opened(
        model=wide,
        data=data,
        fleet=who,
        rule=RULES["flexlora"],
        local=LocalTraining(batch=8, epochs=1),
        settings=RunSettings(evaluation=QUIET, split=SplitSettings()),
    )
    with made as run:
        _, updates = watched(run.engine)
        (record,) = run.rounds(1)
        rows = {id: run.work[id].rows["train"] for id in data}
    up = down = 0
    for one in updates:
        tokens = sum(len(row.input_ids) for row in rows[one.client])
        assert one.metrics["tokens"] == tokens
        steps = -(-len(rows[one.client]) // 8)
        payload = 2 * tokens * wide.spec.hidden
        head = FRAME + len(one.client)
        ways = 1 if cut.upper is None else 2
        labels = 4 * tokens if cut.upper is None else 0
        sent = ways * payload + labels + 4 * len(rows[one.client]) + steps * head * (ways + 1)
        back = ways * payload + steps * head * (ways + 1)
        assert (one.metrics["wire_up"], one.metrics["wire_down"]) == (sent, back)
        assert sent < 1.03 * ways * payload
        assert back < 1.03 * ways * payload
        up, down = up + sent, down + back
    assert (record.wire_up, record.wire_down) == (up, down)
    held = cut.at_client(BLOCKS)
    own = sum(3 * (s.m + s.n) * 4 for s in wide.spec.sites if s.block in held)
    assert record.bytes_up - up == 2 * own
    assert record.bytes_down - down == 2 * own


# --- from the command line ---

RECIPE = SHIPPED["split"]
FAST = ("rounds=2", "local.steps=2", "evaluation.every=0", "evaluation.generate=0")


def test_the_recipe_of_a_split_run_runs_to_its_end(tmp_path: Path) -> None:
    done = polyrank("run", RECIPE, *FAST, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    told = " ".join(done.err.split())
    assert told.count("split: the server") == 1
    assert "sees activations, from which most tokens can be recovered" in told
    for type, where in {
        "T1": "block 0 of 4",
        "T2": "blocks 0–1 of 4",
        "T3": "blocks 0 and 3 of 4 (U)",
        "T4": "whole",
    }.items():
        assert lines_with(done.err, f" {type} ", where)
    assert "activations and gradients" in " ".join(done.out.split())
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    records = [RoundRecord.from_json(json.loads(line)) for line in lines]
    assert len(records) == 2
    for record in records:
        assert sum(record.cuts.values()) == len(record.clients) == 9
        assert set(record.cuts) <= {"1", "2", "1–3", "whole"}
        assert 0 < record.wire_up < record.bytes_up
        assert 0 < record.wire_down < record.bytes_down
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["wire_up"] == sum(record.wire_up for record in records)
    assert summary["final"]["seen"]["loss"] < summary["base"]["seen"]["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    again = polyrank("resume", tmp_path / "run")
    first, _, rest = again.out.partition("\n")
    assert first == f"{tmp_path / 'run'}: finished before, nothing was trained"
    assert (again.code, rest) == (0, done.out)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fleet.cuts.T1=[2,4]", r"fleet\.cuts\.T1.* within 1…3, as the model has 4 blocks"),
        ("fleet.cuts.T1=0", r"T1"),
        ("fleet.cuts.T9=1", r"fleet\.cuts: no LoRA type \['T9'\]"),
        ("split.wire=fp8", r"split\.wire"),
        ("split.adapters=shared", r"split\.adapters = 'shared'.*one adapter has one rank"),
    ],
)
def test_a_cut_that_cannot_be_is_an_error_and_nothing_is_begun(
    tmp_path: Path, setting: str, message: str
) -> None:
    done = polyrank("run", RECIPE, *FAST, setting, "--out", tmp_path / "run")
    assert done.code == 1
    assert re.search(message, " ".join(done.err.split())), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
