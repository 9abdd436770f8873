"""Local methods by name: what they stand for, what contradicts them, which rules exclude them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from federations import LOCAL, QUIET, opened
from polyrank import config
from polyrank.aggregation import DEFAULT, FlexLoRA, FLoRA, SLoRA, rule
from polyrank.errors import RecipeError
from polyrank.run import RunSettings
from polyrank.training import METHODS, LocalSettings, LocalTraining, local_method

RECIPE = """
model.source = "sample"
data.source = "sample"
fleet.distribution = "uniform"
"""


@pytest.fixture
def read(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return lambda *overrides: config.read(path, [f"local.{one}" for one in overrides])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", LocalSettings("sgd", 0.0, 0)),
        ("fedit", LocalSettings("adamw", 0.0, 0)),
        ("fedprox", LocalSettings("adamw", 0.01, 0)),
        ("slora", LocalSettings("adamw", 0.0, 5)),
    ],
)
def test_a_name_stands_for_these_settings(read, name, expected):
    assert METHODS[name].settings() == expected
    recipe = read(f"method={name}")
    assert recipe.local.resolved == expected
    assert isinstance(recipe.rule(), SLoRA) == bool(expected.sparse_rounds)
    assert name in expected.methods


def test_without_a_name_the_keys_stand_for_themselves_and_by_default_for_fedit(read):
    assert read().local.resolved == LocalSettings("adamw", 0.0, 0)
    assert read().local == LocalTraining()
    both = read("optimizer=sgd", "proximal=0.5", "sparse_rounds=2")
    assert both.local.resolved == LocalSettings("sgd", 0.5, 2)
    assert both.local.resolved.methods == ("fedavg", "fedprox", "slora")
    assert both.rule() == SLoRA(rule(DEFAULT), 2)


def test_a_key_beside_a_name_may_say_how_strong_or_how_long(read):
    assert read("method=fedprox", "proximal=1").local.resolved.proximal == 1
    assert read("method=fedprox", "optimizer=sgd").local.optimizer == "sgd"
    assert read("method=slora", "sparse_rounds=3").rule().rounds == 3
    assert read("method=fedavg", "optimizer=sgd", "proximal=0").local.resolved.proximal == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=fedavg", "optimizer=adamw"), r"'fedavg' and local\.optimizer = 'adamw'"),
        (("method=fedit", "optimizer=sgd"), r"'fedit' and local\.optimizer = 'sgd'"),
        (("method=fedit", "proximal=0.1"), r"'fedit' and local\.proximal = 0\.1"),
        (("method=fedprox", "proximal=0"), r"'fedprox' and local\.proximal = 0"),
        (("method=fedavg", "sparse_rounds=1"), r"'fedavg' and local\.sparse_rounds = 1"),
        (("method=slora", "sparse_rounds=0"), r"'slora' and local\.sparse_rounds = 0"),
        (("method=slora", "proximal=1"), r"'slora' and local\.proximal = 1"),
        (("method=fedsgd",), r"local\.method: expected one of"),
        (("proximal=-1",), r"local\.proximal"),
        (("sparse_rounds=-1",), r"local\.sparse_rounds"),
        (("sparse_rounds=10",), "10 of 10 rounds would be sparse"),
    ],
)
def test_what_contradicts_is_refused_before_anything_is_loaded_naming_both(read, overrides, said):
    with pytest.raises(RecipeError, match=said):
        read(*overrides)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'fedprox'"):
        local_method("fedproxy")


def test_a_negative_or_infinite_pull_is_refused():
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(
            RecipeError, match=r"local\.proximal: expected (at least 0|a finite number)"
        ):
            LocalTraining(proximal=value)


@pytest.mark.parametrize("how", ["method=slora", "sparse_rounds=2"])
def test_a_rule_that_excludes_a_local_method_is_refused_with_its_reason(tmp_path, how):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'flora' and the local method 'slora' exclude") as told:
        config.read(path, ["aggregation.rule=flora", f"local.{how}"])
    assert FLoRA().excludes["slora"] in str(told.value)


def test_exclusion_is_by_name_and_not_of_slora_alone(read, monkeypatch):
    monkeypatch.setattr(FlexLoRA, "excludes", {"fedavg": "for the sake of this test"})
    with pytest.raises(RecipeError, match="for the sake of this test"):
        read("method=fedavg")
    with pytest.raises(RecipeError, match="for the sake of this test"):
        read("optimizer=sgd")
    read("method=fedit")


def test_a_recipe_with_a_method_written_and_read_again_is_the_same(read, tmp_path):
    recipe = read("method=slora", "sparse_rounds=4")
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert config.read(again) == recipe


def test_what_a_rule_wraps_is_described_with_the_run(tmp_path):
    run_settings = RunSettings(evaluation=QUIET, cohort=2)
    rule = SLoRA(FlexLoRA("delta", split="balanced"), 1)
    local = replace(LOCAL, proximal=0.5)
    with opened(tmp_path / "run", rule=rule, settings=run_settings, local=local) as run:
        list(run.rounds(2))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["options"]["rounds"] == 1
    assert settings["options"]["inner"]["split"] == "balanced"
    assert settings["local"]["proximal"] == 0.5
