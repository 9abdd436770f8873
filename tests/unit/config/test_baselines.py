"""Baselines by name: what they set in a recipe, and what contradicts them."""

import tomllib

import pytest

from polyrank import config
from polyrank.config.baselines import BASELINES
from polyrank.errors import RecipeError
from polyrank.planning import CutPoint, Fleet, LoRAType

BASE = {
    "model": {"source": "sample"},
    "data": {"source": "sample"},
    "fleet": {"types": {"T1": 1, "T2": 4}, "distribution": {"T1": 0.5, "T2": 0.5}},
}
CUT = {**BASE["fleet"], "cuts": {"T1": 1}}


def parsed(name, **sections):
    return config.parse({"baseline": name, **BASE, **sections})


@pytest.mark.parametrize(
    ("name", "rule", "pooled", "force", "adapters"),
    [
        ("splitlora", "fedit", False, "weakest", "shared"),
        ("cenlora", "fedit", True, None, "own"),
        ("ft", "full", True, None, "own"),
        ("hetlora", "hetlora", False, None, "own"),
        ("fedlora", "fedit", False, "weakest", "own"),
    ],
)
def test_a_name_stands_for_these_keys(name, rule, pooled, force, adapters):
    recipe = parsed(name, fleet=CUT if name == "splitlora" else BASE["fleet"])
    recipe.check()
    found = recipe.aggregation.rule, recipe.data.pooled, recipe.fleet.force, recipe.split.adapters
    assert found == (rule, pooled, force, adapters)
    assert recipe.run_settings().pooled is pooled
    assert recipe.rule().name == rule
    known = BASELINES[name]
    assert (known.rule, known.pooled, known.force) == (rule, pooled, force)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_written_out_is_read_as_the_same_recipe(name):
    recipe = parsed(name, fleet=CUT if name == "splitlora" else BASE["fleet"])
    assert config.parse(tomllib.loads(recipe.to_toml())) == recipe


def test_a_forced_type_stays_forced_and_other_keys_stay_as_given():
    fleet = {**BASE["fleet"], "force": "T2"}
    recipe = parsed(
        "fedlora",
        fleet=fleet,
        local={"method": "fedprox"},
        aggregation={"weights": "capped", "cap": 3},
    )
    assert (recipe.fleet.force, recipe.local.method) == ("T2", "fedprox")
    assert (recipe.aggregation.cap, recipe.aggregation.rule) == (3, "fedit")


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("ft", {"aggregation": {"rule": "fedit"}}, r"'ft' and aggregation.rule = 'fedit' .*'full'"),
        ("ft", {"data": {"source": "sample", "pooled": False}}, r"data.pooled = False .*is True"),
        ("hetlora", {"data": {"source": "sample", "pooled": True}}, "data.pooled = True"),
        ("cenlora", {"fleet": CUT}, r"fleet.cuts = {'T1': 1} .* its cuts is none"),
        ("fedlora", {"fleet": CUT}, r"fleet.cuts = {'T1': 1} contradict"),
        ("splitlora", {"split": {"adapters": "own"}}, "split.adapters = 'own' contradict"),
    ],
)
def test_a_key_that_makes_it_another_method_is_refused_with_both_names(name, sections, message):
    with pytest.raises(RecipeError, match=message):
        parsed(name, **sections)


def test_the_value_that_the_baseline_sets_itself_is_no_contradiction():
    recipe = parsed("ft", aggregation={"rule": "full"}, fleet={**BASE["fleet"], "cuts": {}})
    assert recipe.aggregation.rule == "full"


def test_splitlora_needs_a_cut_for_the_type_that_all_have():
    with pytest.raises(RecipeError, match=r"'splitlora' cuts .* in \[fleet.cuts\]"):
        parsed("splitlora").check()
    recipe = parsed("splitlora", fleet=CUT)
    recipe.check()
    types = {name: LoRAType(name, {"all": rank}) for name, rank in (("T1", 1), ("T2", 4))}
    weak = Fleet(types, {"a": "T1", "b": "T1"}, cuts={"T1": CutPoint(1)})
    recipe.check_fleet(weak)
    other = Fleet(types, {"a": "T2", "b": "T2"}, cuts={"T1": CutPoint(1)})
    with pytest.raises(RecipeError, match="clients of type T2 have no cut"):
        recipe.check_fleet(other)
    parsed("fedlora").check_fleet(other)  # The others have no need of cuts.


def test_a_mistake_beside_a_baseline_is_named_as_ever():
    with pytest.raises(RecipeError, match=r"baseline: expected one of .*'splitlora'.*'fedlora'"):
        parsed("splitlore")
    with pytest.raises(RecipeError, match=r"missing; a recipe must have the section \[data\]"):
        config.parse({"baseline": "ft", "model": BASE["model"], "fleet": BASE["fleet"]})
    with pytest.raises(RecipeError, match="aggregation: expected a section"):
        parsed("ft", aggregation=3)


def test_an_override_names_a_baseline(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[model]\nsource = "sample"\n[data]\nsource = "sample"\n'
        '[fleet]\ndistribution = "uniform"\n[aggregation]\nrule = "flexlora"\n'
    )
    recipe = config.read(file, ["baseline=ft", "aggregation.rule="])
    assert (recipe.aggregation.rule, recipe.data.pooled) == ("full", True)
    with pytest.raises(RecipeError, match=r"recipe.toml: baseline = 'ft' and aggregation.rule"):
        config.read(file, ["baseline=ft"])
