"""Run folders whose rule is not one of polyrank's: what can be read, and what to do instead."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tomli_w

import federations
from polyrank.aggregation import FlexLoRA
from polyrank.errors import InexactResumeError, RunError
from polyrank.runner.inspect import adapter_of, look
from runs import polyrank


@dataclass(frozen=True)
class Halved(FlexLoRA):
    """A user's own rule: FlexLoRA under a name that no registry has."""

    strength: float = 0.5

    @property
    def name(self) -> str:
        return "halved"


@dataclass(frozen=True)
class Renamed(FlexLoRA):
    @property
    def name(self) -> str:
        return "renamed"


@pytest.fixture
def run(tmp_path):
    with federations.opened(tmp_path / "run", rule=Halved()) as opened:
        list(opened.rounds(1))
    return tmp_path / "run"


def test_it_goes_on_in_python_with_the_same_rule_and_with_no_other(run):
    with federations.opened(run, rule=Halved(), resume=True) as opened:
        assert [record.round for record in opened.rounds(2)] == [2]
    with pytest.raises(InexactResumeError, match=r"settings\.options\.strength: was 0\.5, is 0\.2"):
        federations.opened(run, rule=replace(Halved(), strength=0.2), resume=True)
    with pytest.raises(InexactResumeError, match=r"settings\.rule: was 'halved', is 'renamed'"):
        federations.opened(run, rule=Renamed(), resume=True)


def test_inspect_shows_its_rounds_and_says_whose_code_the_adapter_needs(run):
    inspection = look(run)
    assert [record.round for record in inspection.records] == [1]
    with pytest.raises(RunError, match=f"its rule {Halved.__module__}:Halved is code outside"):
        inspection.spectra()
    done = polyrank("inspect", run)
    assert done.code == 0, done.err
    assert "no round is finished" not in done.out


@pytest.mark.parametrize("command", [["resume"], ["export"]])
def test_commands_that_need_a_recipe_say_how_to_go_on_in_python(run, tmp_path, command):
    target = [tmp_path / "out"] if command == ["export"] else []
    done = polyrank(*command, run, *target)
    assert done.code == 1
    assert f"{run}: this run was made from Python" in done.err
    assert f"federation.resume({str(run)!r})" in done.err
    with pytest.raises(RunError, match="made from Python"):
        adapter_of(run)


# --- a rule that a recipe names as module:Class ---

RULE = """
from dataclasses import dataclass

import polyrank as pr


@dataclass(frozen=True)
class Mine(pr.FlexLoRA):
    @property
    def name(self) -> str:
        return "mine"
"""
RECIPE = {
    "name": "own",
    "rounds": 1,
    "model": {"source": "sample"},
    "data": {"source": "sample"},
    "fleet": {"distribution": "uniform", "types": "scaled"},
    "aggregation": {"rule": "rule_of_a_recipe:Mine"},
    "local": {"steps": 1},
    "sampling": {"number": 2},
    "evaluation": {"every": 0, "examples": 1, "generate": 0},
    "engine": {"threads": 1},
}


def test_a_recipes_own_rule_runs_resumes_and_exports_where_its_code_is_allowed(
    tmp_path, monkeypatch
):
    (tmp_path / "rule_of_a_recipe.py").write_text(RULE)
    (tmp_path / "own.toml").write_text(tomli_w.dumps(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in (["check", "own.toml"], ["run", "own.toml", "--out", "run"]):
        refused = polyrank(*command)
        assert (refused.code, refused.out) == (1, "")
        assert "rule_of_a_recipe:Mine" in refused.err
        assert "--allow-code" in refused.err
    assert "rule_of_a_recipe" not in sys.modules
    done = polyrank("run", "own.toml", "--out", "run", "--allow-code", "--json")
    assert json.loads(done.out)["method"] == "mine", done.err
    assert json.loads(Path("run/run.json").read_text())["rule_class"] == "rule_of_a_recipe:Mine"

    recipe = Path("run/recipe.toml")
    recipe.write_text(recipe.read_text().replace("rounds = 1\n", "rounds = 2\n"))
    for command in (["resume", "run"], ["export", "run", "out"]):
        refused = polyrank(*command)
        assert refused.code == 1
        assert "--allow-code" in refused.err
    done = polyrank("resume", "run", "--allow-code", "--json")
    assert json.loads(done.out)["rounds"] == 2, done.err
    assert polyrank("export", "run", "out", "--allow-code").code == 0
    assert Path("out/adapter_model.safetensors").is_file()
    assert polyrank("inspect", "run").code == 0
