"""Recipes that describe devices: what is planned, explained and run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import models
from kill_runs import driven
from measured import kept_by_training
from polyrank import config
from polyrank.model import LoadedModel
from polyrank.model.anatomy import load_bare
from polyrank.run.planning import Importance
from polyrank.runner.plans import planning_of, preview
from polyrank.training import prepare
from runs import RECIPE, adapter_bytes, lines_with, polyrank, widest, write_recipe

PLANNED = RECIPE.replace(
    """types = {T1 = 1, T2 = {attention = 2, feed-forward = 6}}
distribution = {T1 = 0.5, T2 = 0.5}
""",
    """distribution = {phone = 0.5, laptop = 0.5}

[devices.phone]
memory = "50 KiB"
flops = "1 GFLOPS"
up = "10 Mbit/s"
down = "50 Mbit/s"
latency = "20 ms"

[devices.laptop]
memory = "155 KiB"
flops = "20 GFLOPS"
up = "50 Mbit/s"
down = "100 Mbit/s"

[devices.box]
memory = "400 KiB"
flops = "1 TFLOPS"

[plan]
levels = [1, 2, 4]
cuts = "needed"
server = "box"
every = 1
threshold = 0.0
""",
).replace("fraction = 0.5", "fraction = 1.0")
QUICK = ("evaluation.generate=0", "evaluation.own_rank=false")
KEYS = {
    "client",
    "ranks",
    "cut",
    "memory_bytes",
    "memory_budget_bytes",
    "feasible",
    "reason",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    path = write_recipe(folder, PLANNED)
    models.write_tiny(folder / "base", num_hidden_layers=4)
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    done = polyrank("run", recipe, "rounds=3", *QUICK, "--out", folder)
    assert done.code == 0, done.err
    return folder


def plans(recipe: Path, *overrides: str, code: int = 0) -> list[dict]:
    done = polyrank("plan", recipe, *overrides, "--json")
    assert done.code == code, done.err
    return json.loads(done.out)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# --- explained before a run ---


def test_the_json_says_of_every_client_what_it_trains_and_what_that_takes(recipe):
    found = plans(recipe)
    assert [one["client"] for one in found] == ["task0", "task1", "task2", "task3"]
    assert [one["device"] for one in found].count("phone") == 2
    for one in found:
        assert one.keys() >= KEYS
        assert one["feasible"] is True
        assert one["memory_bytes"] <= one["memory_budget_bytes"]
        assert sum(one["memory"].values()) == one["memory_bytes"]
        assert set(one["ranks"].values()) <= {1, 2, 4}
        assert one["change"] == {}
        assert one["seconds_per_round"] > one["seconds_per_step"] > 0
    by_device = {one["device"]: one for one in found}
    assert (by_device["phone"]["cut"], by_device["laptop"]["cut"]) == (1, None)
    assert by_device["phone"]["wire_bytes_per_step"]["up"] > 0
    assert by_device["phone"]["memory_budget_bytes"] == 50 * 1024


def test_the_table_says_it_for_people(recipe):
    done = polyrank("plan", recipe)
    assert done.code == 0
    assert widest(done.out) <= 80
    (phone,) = lines_with(done.out, "phone", "block 0 of 4")
    assert re.search(r"phone +2 +\d.* KiB +50\.0 KiB +\d\S* +block 0 of 4", phone)
    assert lines_with(done.out, "laptop", "2", "whole")
    assert re.search(r"phone +\d × \d.* +\d × \d", done.out)
    said = " ".join(done.out.split())
    cut = said.partition("phone: cut: the whole model needs")[2]
    assert "its budget" in cut
    assert "the server's memory" in cut
    assert "laptop: whole; ranks there are held down by its budget" in said
    rich = polyrank("plan", recipe, "devices.laptop.memory='1 GiB'", "plan.server=").out
    said = " ".join(rich.split())
    assert "laptop: whole; ranks there are held down by the top level, 4" in said
    assert "at the server by the top level, 4" in said
    assert "times leave out what is not given: server.flops" in said


def test_what_a_run_has_is_what_was_explained(recipe, run):
    fleet = json.loads((run / "fleet.json").read_text())
    for one in plans(recipe):
        assert fleet["clients"][one["client"]] == one["device"]
        assert fleet["ranks"][one["device"]] == one["ranks"]
        assert fleet["cuts"].get(one["device"]) == one["cut"]


def test_a_run_plans_anew_and_notes_it(run):
    found = records(run)
    assert any(record["planned_anew"] for record in found)
    assert all(record["modelled_seconds"] > 0 for record in found)
    assert json.loads((run / "run.json").read_text())["settings"]["plan"]["score_every"] == 1
    assert (run / "adapter" / "adapter_config.json").exists()


def test_measured_memory_of_a_planned_client_is_within_its_budget(recipe):
    """Weights, factors with gradients and moments, and what a scored pass keeps: measured."""
    read = config.read(recipe, [])
    clients = read.clients()
    model: LoadedModel = read.model.load()
    work, _ = prepare(clients, model, read.data.encoding())
    planning = planning_of(read, model, read.fleet_of(clients), work)
    plan = planning.plans(Importance())["laptop"]
    assert plan.cut is None
    load = planning.planner.cost.workload
    kept = kept_by_training(model, plan.ranks, load.batch, load.length, load.targets, scored=True)
    shapes = model.spec.shapes
    factors = 4 * sum(rank * sum(shapes[site]) for site, rank in plan.ranks.items())
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    held = weights + 4 * factors + kept  # Values, gradients and Adam's two moments.
    assert 0.8 * plan.device.memory_bytes < held <= plan.device.memory_bytes


def test_planning_reads_no_weights(recipe, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(recipe.parent, folder)
    weights = list((folder / "base").glob("*.safetensors"))
    assert weights
    for file in weights:
        file.unlink()
    assert plans(folder / recipe.name) == plans(recipe)


def test_a_model_of_seventy_billion_is_planned_from_its_configuration(tmp_path):
    recipe = write_recipe(
        tmp_path,
        PLANNED.replace('memory = "50 KiB"', 'memory = "12 GiB"')
        .replace('memory = "155 KiB"', 'memory = "80 GiB"')
        .replace('memory = "400 KiB"', 'memory = "640 GiB"')
        .replace("levels = [1, 2, 4]\n", "")
        .replace('cuts = "needed"\n', ""),
    )
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base").mkdir()
    models.tiny_tokenizer().save_pretrained(tmp_path / "base")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=models.VOCABULARY,
        max_position_embeddings=4096,
    ).save_pretrained(tmp_path / "base")
    found = {one["device"]: one for one in plans(recipe, "model.dtype='bfloat16'")}
    assert 0 < found["phone"]["cut"] < found["laptop"]["cut"] < 80
    for one in found.values():
        assert one["memory_bytes"] <= one["memory_budget_bytes"]
        assert len(one["ranks"]) == 560


# --- who cannot take part ---


def test_a_refused_client_is_told_which_budget_fails_by_how_much_and_what_would_do(recipe):
    poor = "devices.phone.memory='20 KiB'"
    phone = next(one for one in plans(recipe, poor, code=1) if one["device"] == "phone")
    assert phone["feasible"] is False
    needed = phone["change"]["memory"]
    missing = needed - 20 * 1024
    assert needed == phone["memory_bytes"]
    assert phone["reason"].startswith("memory: the least that can be trained")
    assert f"{missing} bytes too few" in phone["reason"]
    enough = plans(recipe, f"devices.phone.memory={needed}")
    assert all(one["feasible"] for one in enough)
    less = 20 * 1024 + int(0.99 * missing)
    again = plans(recipe, f"devices.phone.memory={less}", code=1)
    assert [one["feasible"] for one in again if one["device"] == "phone"] == [False, False]
    assert all(one["feasible"] for one in again if one["device"] == "laptop")
    done = polyrank("plan", recipe, poor)
    assert done.code == 1
    said = " ".join(done.out.split())
    assert f"{needed} bytes of memory" in said.partition("phone cannot take part")[2]


def test_a_round_that_would_take_too_long_is_refused_with_the_time_that_would_do(recipe):
    def phone(seconds: float, code: int) -> dict:
        slow = ("devices.phone.memory='500 KiB'", "devices.phone.flops=1e7")
        found = plans(recipe, *slow, f"plan.seconds={seconds!r}", code=code)
        assert all(one["feasible"] for one in found if one["device"] == "laptop")
        return next(one for one in found if one["device"] == "phone")

    refused = phone(0.01, code=1)
    assert refused["reason"].startswith("time: a round of it takes")
    needed = refused["change"]["seconds"]
    assert refused["change"].keys() == {"seconds"}
    assert phone(needed, code=0)["feasible"]
    assert not phone(0.01 + 0.99 * (needed - 0.01), code=1)["feasible"]


def test_a_run_with_a_client_that_cannot_take_part_begins_nothing(recipe, tmp_path):
    done = polyrank("run", recipe, "devices.phone.memory=1000", "--out", tmp_path / "out")
    assert done.code == 1
    assert "phone: memory: the least that can be trained" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.levels=[]", r"plan\.levels: .*got none"),
        ("plan.levels=[4, 2]", r"plan\.levels: .*4 before 2"),
        ("plan.levels=[64]", r"plan\.levels: the smallest, 64"),
        ("plan.every=0", r"plan\.every: expected 'auto' or a whole number, at least 1"),
        ("plan.every=-3", r"plan\.every"),
        ("plan.threshold=-0.1", r"plan\.threshold"),
        ("plan.seconds=0", r"plan\.seconds"),
        ("plan.lowest_cut=0", r"plan\.lowest_cut"),
        ("plan.lowest_cut=4", r"plan\.lowest_cut: 4 of 4 blocks"),
        ("plan.cuts='some'", r"plan\.cuts"),
        ("plan.importance='size'", r"plan\.importance"),
        ("plan={allocation='spectrum', importance='none'}", r"exclude each other"),
        ("plan.server='boxx'", r"boxx.*box"),
        ("fleet.distribution={fone = 0.5, laptop = 0.5}", r"fone.*phone"),
        ("fleet.distribution='uniform'", r"fleet\.distribution: with \[plan\]"),
        ("fleet.types={T1 = 1}", r"fleet\.types: with \[plan\]"),
        ("fleet.cuts={phone = 1}", r"fleet\.cuts: with \[plan\]"),
        ("fleet.force='box'", r"fleet\.force.*box"),
        ("devices.phone.memory=-1", r"devices\.phone\.memory"),
        ("devices.phone.flops='fast'", r"devices\.phone\.flops"),
        ("devices.phone.latency=-1", r"devices\.phone\.latency"),
        ("devices.phone.memori='1 GiB'", r"devices\.phone: unknown key 'memori'.*'memory'"),
        ("devices.phone={flops = 1e9}", r"devices\.phone\.memory: missing"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_place(recipe, override, message):
    done = polyrank("plan", recipe, override)
    assert done.code != 0
    assert re.search(message, " ".join(done.err.split())), done.err
    assert "Traceback" not in done.err


def test_a_recipe_without_a_plan_has_nothing_to_plan(tmp_path):
    done = polyrank("plan", write_recipe(tmp_path))
    assert done.code != 0
    assert "there is nothing to plan" in done.err


@pytest.mark.parametrize(
    ("written", "message"),
    [("{", "config.json"), ('{"model_type": "nothing-known"}', "nothing-known"), (None, "base")],
)
def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path, written, message):
    recipe = write_recipe(tmp_path, PLANNED)
    file = tmp_path / "base" / "config.json"
    if written is None:
        file.unlink()
    else:
        file.write_text(written)
    done = polyrank("plan", recipe)
    assert done.code != 0
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_is_refused_with_what_to_do_instead(tmp_path, architecture):
    recipe = write_recipe(tmp_path, PLANNED)
    shutil.rmtree(tmp_path / "base")
    models.write_tiny(tmp_path / "base", architecture)
    done = polyrank("plan", recipe)
    assert done.code != 0
    said = " ".join(done.err.split())
    assert "cannot be foreseen" in said
    assert "Give every client its ranks yourself" in said


# --- runs ---


def test_every_killed_planned_run_ends_with_the_same_bytes(tmp_path):
    report = driven("steps", 3, tmp_path, "planned")
    for one in report["runs"]:
        assert one["ended"][0] == "SIGKILL", one
        assert one["ended"][-1] == "exit 0", one
        assert one["differing"] == [], one
    assert any(name.endswith("importance.json") for name in report["files"])


@pytest.mark.slow
def test_every_planned_run_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    report = driven("kill", 12, tmp_path, "planned")
    for one in report["runs"]:
        assert one["ended"][-1] == "exit 0", one
        assert one["differing"] == [], one


def test_the_same_recipe_gives_the_same_bytes(recipe, run, tmp_path):
    done = polyrank("run", recipe, "rounds=3", *QUICK, "--out", tmp_path / "again")
    assert done.code == 0, done.err
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(run)


@pytest.mark.parametrize(
    "override",
    [
        "aggregation.rule='flora'",
        "aggregation.rule='flexlora:delta'",
        "aggregation.rule='flora:keep'",
        "aggregation.rule='segment'",
        "plan.cuts='best'",
        "plan.importance='paper'",
        "plan.importance='none'",
        "plan.allocation='spectrum'",
        "fleet.force='weakest'",
        "fleet.force='laptop'",
        "fleet.redraw=1",
        "split.adapters='shared'",
    ],
)
def test_planned_ranks_go_with(recipe, tmp_path, override):
    done = polyrank("run", recipe, *QUICK, override, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert [record["round"] for record in records(tmp_path / "out")] == [1, 2]


def test_clients_may_keep_their_labels(recipe, tmp_path):
    shaped = ("plan.u_shape=true", "devices.phone.memory='90 KiB'")
    done = polyrank("run", recipe, *QUICK, *shaped, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "fleet.json").read_text())["cuts"] == {"phone": [1, 3]}


def test_the_control_has_the_plan_of_the_weakest_device(recipe, tmp_path):
    done = polyrank("run", recipe, *QUICK, "--control", "weakest", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    own = json.loads((tmp_path / "out" / "fleet.json").read_text())
    control = json.loads((tmp_path / "out" / "control" / "fleet.json").read_text())
    assert set(own["clients"].values()) == {"phone", "laptop"}
    assert set(control["clients"].values()) == {"phone"}
    assert control["ranks"]["phone"] == own["ranks"]["phone"]
    assert control["cuts"] == {"phone": own["cuts"]["phone"]}


@pytest.mark.parametrize(
    "name",
    [
        "splitlora",
        "cenlora",
        "ft",
        "hetlora",
        "fedlora",
        "hsplitlora",
        "hsplitlora:no-importance",
        "hsplitlora:no-adaptation",
        "hsplitlora:no-exact-sum",
    ],
)
def test_every_baseline_runs_with_a_plan(recipe, tmp_path, name):
    given = ["rounds=2", f"baseline='{name}'", *QUICK, "--out", tmp_path / "out"]
    done = polyrank("run", recipe, *given)
    assert done.code == 0, done.err
    fleet = json.loads((tmp_path / "out" / "fleet.json").read_text())
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    weakest = {"splitlora", "fedlora", "hsplitlora:no-adaptation"}
    assert (set(fleet["clients"].values()) == {"phone"}) == (name in weakest)
    unscored = {"cenlora", "ft", "hetlora", "splitlora", "fedlora", "hsplitlora:no-importance"}
    assert (settings["plan"]["score_every"] == 0) == (name in unscored)
    assert len(records(tmp_path / "out")) == 2


def test_a_rule_of_one_rank_cannot_follow_importance(recipe, tmp_path):
    given = ["aggregation.rule='fedit'", "fleet.force='weakest'", "--out", tmp_path / "out"]
    done = polyrank("run", recipe, *given)
    assert done.code != 0
    assert "planned anew, by plan.importance" in " ".join(done.err.split())


def test_a_baseline_that_plans_needs_devices(tmp_path):
    recipe = write_recipe(tmp_path)
    done = polyrank("run", recipe, "baseline='hsplitlora'", "--out", tmp_path / "out")
    assert done.code != 0
    assert "describe them: a section [plan]" in " ".join(done.err.split())


def test_a_bare_model_has_the_same_plans_as_a_loaded_one(recipe):
    read = config.read(recipe, [])
    bare = preview(read)
    folder = Path(read.model.source)
    assert load_bare(folder if folder.exists() else recipe.parent / "base").module.device == (
        torch.device("meta")
    )
    loaded = read.model.load()
    clients = read.clients()
    work, _ = prepare(clients, loaded, read.data.encoding())
    planning = planning_of(read, loaded, read.fleet_of(clients), work)
    assert planning.plans(Importance()) == bare.plans
