"""`polyrank check`: what a run would do, without training."""

import json
from pathlib import Path
from typing import Any

import pytest

from kit import kit_path
from polyrank import config
from polyrank.training import prepare
from runs import lines_with, polyrank, widest, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("check"))


def checked(recipe: Path, *overrides: str, code: int = 0) -> dict[str, Any]:
    done = polyrank("check", recipe, *overrides, "--json")
    assert done.code == code, done.err
    return json.loads(done.out)


def test_the_counts_are_those_of_the_data_and_the_types_those_of_the_fleet(recipe: Path) -> None:
    told = checked(recipe)
    read = config.read(recipe)
    work, _ = prepare(read.clients(), read.model.load_bare(), read.data.encoding())
    tokens = {
        id: sum(len(row.input_ids) for row in client.rows["train"])
        for id, client in work.items()
        if client.seen
    }
    assert told["clients"] == {"training": 4, "held_out": 2, "a_round": 2}
    assert told["tokens"]["by_client"] == tokens
    assert told["tokens"]["train"] == sum(tokens.values())
    types = {kind["name"]: kind for kind in told["types"]}
    assert {name: kind["clients"] for name, kind in types.items()} == {"T1": 2, "T2": 2}
    assert types["T2"]["ranks"] == {"2": 8, "6": 6}
    assert 0 < types["T1"]["memory_bytes"] < types["T2"]["memory_bytes"]
    assert told["memory"]["needed_bytes"] == types["T2"]["memory_bytes"]
    assert told["problems"] == []


def test_time_grows_with_the_work(recipe: Path) -> None:
    once, twice = (checked(recipe, f"rounds={n}")["time"]["operations"] for n in (2, 4))
    assert twice == 2 * once
    longer = checked(recipe, "local.steps=6")["time"]["operations"]
    assert longer == 3 * once


def test_a_control_is_counted(recipe: Path) -> None:
    alone, both, weak = (
        checked(recipe, *changes)["time"]
        for changes in ([], ["control=weakest"], ["fleet.force=weakest"])
    )
    assert alone["operations_of_control"] == 0
    assert both["operations_of_control"] == weak["operations"]
    assert both["operations"] == alone["operations"] + weak["operations"]
    assert "of training, the control's too" in " ".join(
        polyrank("check", recipe, "control=weakest").out.split()
    )


def test_a_page_for_people_says_the_same_in_80_columns(recipe: Path) -> None:
    done = polyrank("check", recipe)
    assert done.code == 0, done.err
    assert lines_with(done.out, "4 clients to train, 2 of them in a round; 2 held out")
    assert lines_with(done.out, "T2", "2 at 8 matrices, 6 at 6 matrices")
    assert done.out.splitlines()[-1] == "can run"
    model = str(recipe.parent)
    assert widest("\n".join(line for line in done.out.splitlines() if model not in line)) <= 80


def test_rows_that_are_left_out_are_named_with_the_reason(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with (tmp_path / "tasks.jsonl").open("a") as file:
        for row in (
            {"task": "task0", "instruction": "w90", "output": " "},
            {"task": "task0", "instruction": " ".join(["w5"] * 100), "output": "w4"},
        ):
            file.write(json.dumps({"unseen": False, **row}) + "\n")
    assert checked(recipe)["skipped"] == {
        "no completion": ["row 60"],
        "too long": ["task0 row 61"],
    }
    assert lines_with(polyrank("check", recipe).out, "not used: 1 too long (task0 row 61)")


def test_nothing_is_trained_and_no_weights_are_read(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert checked(recipe)["problems"] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "override",
    [
        "local.lrr=1",
        "model.source=/nowhere",
        "data.source=nowhere.jsonl",
        "data.by=colour",
        "data.max_length=65",
        "data.max_length=2",
        "model.sites=zebra",
        "fleet.types={T1 = 17, T2 = 1}",
        "fleet.types={T1 = {zebra = 1}, T2 = 1}",
        "fleet.clients={task0 = 'T1'}",
        "fleet.clients={zebra = 'T1'}",
        "fleet.cuts={T1 = 9}",
        "aggregation.rule=fedit",
        "evaluation.max_new_tokens=99",
        "target_perplexity=3",
    ],
)
def test_what_stops_a_run_stops_the_check_with_the_same_words(
    recipe: Path, tmp_path: Path, override: str
) -> None:
    run = polyrank("run", recipe, override, "--out", tmp_path / "run")
    check = polyrank("check", recipe, override)
    errors = [
        next(line for line in done.err.splitlines() if line.startswith("error: "))
        for done in (run, check)
    ]
    assert errors[0] == errors[1]
    assert run.code == check.code == 1


PLANNED = """
[devices.phone]
memory = "50 KiB"
[devices.laptop]
memory = "500 MiB"
[plan]
"""


def planned(folder: Path, phone: str) -> Path:
    recipe = write_recipe(folder)
    text = recipe.read_text()
    fleet = text[text.index("[fleet]") : text.index("[local]")]
    named = "[fleet]\ndistribution = {phone = 0.5, laptop = 0.5}\n\n"
    recipe.write_text(text.replace(fleet, named) + PLANNED.replace("50 KiB", phone))
    return recipe


def test_a_planned_recipe_shows_the_devices_with_their_ranks_and_cuts(tmp_path: Path) -> None:
    told = checked(planned(tmp_path, "60 KiB"))
    types = {kind["name"]: kind for kind in told["types"]}
    assert types["laptop"]["cut"] is None
    assert types["phone"]["cut"] == 1
    assert types["phone"]["memory_bytes"] <= 60 * 1024


def test_a_device_that_cannot_take_part_stops_the_check_as_it_stops_the_run(tmp_path: Path) -> None:
    recipe = planned(tmp_path, "1 KiB")
    check, run = polyrank("check", recipe), polyrank("run", recipe, "--out", tmp_path / "run")
    assert check.code == run.code == 1
    assert "devices that cannot take part" in check.err
    assert check.err == run.err


def test_memory_that_is_not_there_is_a_problem(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyrank.runner.check.free_memory", lambda _: 1000)
    (problem,) = checked(recipe, code=1)["problems"]
    assert "lower local.batch" in problem


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("quickstart", ()),
        ("split", ()),
        ("e2e", ("e2e_nlg",)),
        ("compare-e2e", ("e2e_nlg",)),
        ("natural-instructions", ("natural_instructions",)),
    ],
)
def test_shipped_recipes_can_run(name: str, data: tuple[str, ...]) -> None:
    if data:
        kit_path(*data)
    told = checked(Path(name))
    assert told["problems"] == []
    assert told["tokens"]["train"] > 0
