import dataclasses
from pathlib import Path
from typing import Any

import pytest

from polyrank import config
from polyrank.compare import Request
from polyrank.compare.method import Method, methods
from polyrank.config import Recipe
from polyrank.errors import PolyrankError, RecipeError, RuleError, RunError


def recipe(**sections: Any) -> Recipe:
    given: dict[str, Any] = {
        "rounds": 4,
        "model": {"source": "sample"},
        "data": {"source": "sample"},
        "fleet": {"types": {"T1": 1, "T2": 4}, "distribution": {"T1": 0.5, "T2": 0.5}},
        "local": {"lr": 2e-3},
        "engine": {"threads": 1},
    }
    return config.parse(given | sections)


PLAIN = recipe()


def request(
    rules: str = "flexlora,fedit", recipe: Recipe = PLAIN, seeds: int = 2, **more: Any
) -> Request:
    return Request.of(recipe, tuple(rules.split(",")), seeds=seeds, **more)


# --- methods ---


def test_a_rule_that_needs_one_rank_runs_with_all_clients_at_the_weakest() -> None:
    found = methods(["flexlora:delta", "fedit"], None, recipe())
    assert found == [Method("flexlora:delta"), Method("fedit", force="weakest")]
    assert [one.label for one in found] == ["flexlora:delta", "fedit, all weakest"]
    assert [one.slug for one in found] == ["flexlora-delta", "fedit-all-weakest"]


def test_a_fleet_of_one_type_is_not_forced_again() -> None:
    fleet = {"types": {"T1": 1, "T2": 4}, "distribution": "uniform", "force": "T2"}
    assert methods(["fedit"], None, recipe(fleet=fleet)) == [Method("fedit")]


def test_the_control_is_the_first_rule_on_one_type() -> None:
    found = methods(["flexlora:delta", "flexlora"], "T1", recipe())
    assert found[-1] == Method("flexlora:delta", force="T1")
    assert found[-1].label == "flexlora:delta, all T1"
    assert methods(["fedit"], "weakest", recipe()) == [Method("fedit", force="weakest")]


def test_a_baseline_stands_among_the_rules_by_its_name() -> None:
    found = methods(["flexlora", "fedlora", "cenlora", "ft+fedavg", "hetlora"], None, recipe())
    assert found[1:] == [
        Method("fedit", baseline="fedlora"),
        Method("fedit", baseline="cenlora"),
        Method("full", "fedavg", baseline="ft"),
        Method("hetlora"),  # It is the rule of that name.
    ]
    assert [one.label for one in found] == [
        "flexlora",
        "fedlora",
        "cenlora",
        "ft+fedavg",
        "hetlora",
    ]
    assert [one.slug for one in found] == [one.label for one in found]
    assert [one.pooled for one in found] == [False, False, True, True, False]
    assert [one.forced for one in found] == [None, "weakest", None, None, None]


def test_a_baseline_s_recipe_has_its_keys_whatever_the_others_have() -> None:
    cut = {"types": {"T1": 1, "T2": 4}, "distribution": {"T1": 0.5, "T2": 0.5}, "cuts": {"T1": 1}}
    base = recipe(fleet=cut, aggregation={"rule": "flora", "server_rank": 3})

    def of(name: str) -> Recipe:
        [method] = methods([name], None, base)
        return method.recipe(base, rate=0.1, seed=1)

    ft, central, federated, split = map(of, ("ft", "cenlora", "fedlora", "splitlora"))
    assert [one.baseline for one in (ft, central, federated, split)] == [
        "ft",
        "cenlora",
        "fedlora",
        "splitlora",
    ]
    assert [one.data.pooled for one in (ft, central, federated, split)] == [
        True,
        True,
        False,
        False,
    ]
    assert [one.fleet.force for one in (ft, central, federated, split)] == [
        None,
        None,
        "weakest",
        "weakest",
    ]
    assert [bool(one.fleet.cuts) for one in (ft, central, federated, split)] == [
        False,
        False,
        False,
        True,
    ]
    assert (split.split.adapters, federated.split.adapters) == ("shared", "own")
    [other] = methods(["flexlora"], None, base)
    assert other.recipe(base, rate=0.1, seed=1).fleet.cuts == {"T1": 1}
    with pytest.raises(RecipeError, match=r"method 'splitlora': baseline = 'splitlora' cuts"):
        request("splitlora", recipe())


def test_a_control_of_a_baseline_is_that_baseline_on_one_type() -> None:
    found = methods(["cenlora"], "T1", recipe())
    assert found[-1] == Method("fedit", force="T1", baseline="cenlora")
    assert found[-1].label == "cenlora, all T1"
    assert len(methods(["fedlora"], "weakest", recipe())) == 1, "it is that already"


def test_a_recipe_that_is_a_baseline_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the recipe is the baseline 'ft'.* among --rules"):
        request(recipe=recipe(baseline="ft"))
    with pytest.raises(RuleError, match=r"unknown rule 'splitlor'.*or a baseline: .*'splitlora'"):
        request("splitlor")


def test_kept_adapters_are_compared_by_the_name_of_the_rule() -> None:
    found = methods(["flora", "flora:keep"], None, recipe())
    assert [one.slug for one in found] == ["flora", "flora-keep"]
    made = [one.recipe(recipe(), rate=0.1, seed=1).rule().name for one in found]
    assert made == ["flora", "flora:keep"]
    # As a key it would turn `flora` into the other rule, under the first one's name.
    with pytest.raises(RecipeError, match=r"reinitialise: none of the rules has it beside"):
        request("flora,flora:keep", recipe(aggregation={"rule": "flora", "reinitialise": False}))


def test_a_local_method_follows_a_plus() -> None:
    [found] = methods(["flexlora+slora"], None, recipe())
    assert (found.rule, found.local, found.label) == ("flexlora", "slora", "flexlora+slora")


def test_a_run_s_recipe_has_the_method_the_rate_and_the_seed() -> None:
    base = recipe(control="T1", aggregation={"server_rank": 3})
    mixed = Method("flexlora:delta").recipe(base, rate=0.5, seed=7)
    assert (mixed.aggregation.rule, mixed.local.lr, mixed.seed) == ("flexlora:delta", 0.5, 7)
    assert (mixed.control, mixed.fleet.force, mixed.aggregation.server_rank) == (None, None, 3)
    one = Method("fedit", force="weakest").recipe(base, rate=0.5, seed=7)
    assert (one.fleet.force, one.aggregation.server_rank) == ("weakest", None)
    changed = {"seed", "aggregation", "local", "control", "fleet"}
    other = {key: getattr(base, key) for key in changed}
    assert dataclasses.replace(one, **other) == base


def test_an_option_goes_to_the_rules_that_have_it() -> None:
    base = recipe(aggregation={"split": "balanced", "gamma": 0.5})
    made = {
        name: Method(name).recipe(base, rate=1.0, seed=0).aggregation
        for name in ("flexlora", "hetlora", "ffa")
    }
    assert (made["flexlora"].split, made["flexlora"].gamma) == ("balanced", None)
    assert (made["hetlora"].split, made["hetlora"].gamma) == (None, 0.5)
    assert (made["ffa"].split, made["ffa"].gamma) == (None, None)


def test_a_local_method_by_name_takes_the_place_of_the_recipe_s() -> None:
    local = {"optimizer": "adamw", "sparse_rounds": 2}
    base = recipe(local=local)
    made = {
        name: Method("flexlora", name).recipe(base, rate=1.0, seed=0).local
        for name in ("fedavg", "fedit", "slora", "fedprox")
    }
    assert {name: one.method for name, one in made.items()} == {name: name for name in made}
    assert (made["fedavg"].optimizer, made["fedit"].optimizer) == (None, "adamw")
    assert (made["slora"].sparse_rounds, made["fedit"].sparse_rounds) == (2, None)
    assert made["fedprox"].resolved.proximal > 0


def test_a_rule_named_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="flexlora is named twice"):
        request("flexlora,fedit,flexlora")


def test_an_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RuleError, match="flexlora:delta"):
        request("flexlora,flexlora:dleta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control": "T9"}, "'flexlora, all T9'.*T9"),
        ({"seeds": 0}, "seeds"),
        ({"rates": (1e-3,)}, "--tune"),
        ({"tune": True, "rates": (1e-3, -1.0)}, "above 0"),
        ({"tune": True, "rates": ()}, "above 0"),
        ({"tune": True, "recipe": recipe(evaluation={"every": 0})}, "evaluation.every"),
        ({"tune": True, "recipe": recipe(evaluation={"every": 5})}, "evaluation.every=4"),
        ({"recipe": recipe(aggregation={"gamma": 0.5})}, "aggregation.gamma: none of the rules"),
        (
            {"rules": "flora+slora", "recipe": recipe(rounds=9)},
            r"'flora\+slora'.*exclude each other",
        ),
        ({"rules": "flexlora+slra"}, r"'flexlora\+slra'.*slora"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_begun(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(PolyrankError, match=words):
        request(**change)


def test_the_recipe_s_control_and_rate_are_taken_where_none_is_given() -> None:
    asked = request(recipe=recipe(control="T2"))
    assert (asked.control, asked.rates, asked.tune) == ("T2", (2e-3,), False)
    assert request(recipe=recipe(control="T2"), control="T1").control == "T1"
    assert request(tune=True).rates == (0.00067, 2e-3, 0.006)
    assert request(tune=True, rates=(3.0, 1.0)).rates == (1.0, 3.0)


def test_seeds_follow_the_recipe_s() -> None:
    assert request(recipe=recipe(seed=5), seeds=3).seed_values == [5, 6, 7]


# --- going on ---


def test_a_request_is_read_as_it_was_written(tmp_path: Path) -> None:
    for number, asked in enumerate(
        [request(), request(control="weakest", tune=True, rates=(1e-3, 2.5e-3))]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        asked.save(folder)
        assert Request.load(folder) == asked


def test_a_folder_without_a_comparison_or_with_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"comparison\.toml"):
        Request.load(tmp_path)
    request().save(tmp_path)
    file = tmp_path / "comparison.toml"
    file.write_text(file.read_text().replace("schema = 1", "schema = 9"))
    with pytest.raises(RunError, match="schema 1, got 9"):
        Request.load(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rules": "flexlora,fedit,flexlora:delta"},
        {"rules": "flexlora,flexlora:delta,fedit"},
        {"seeds": 5},
        {"control": "weakest"},
        {"recipe": recipe(name="renamed", aggregation={"rule": "fedit"})},
    ],
)
def test_more_of_the_same_goes_on(more: dict[str, Any]) -> None:
    request(**more).continues(request(), Path("out"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": recipe(rounds=5)}, "rounds: was 4, is 5"),
        ({"recipe": recipe(local={"lr": 1e-3})}, "local.lr: was 0.002, is 0.001"),
        ({"recipe": recipe(seed=1)}, "seed: was 0, is 1"),
        ({"rules": "flexlora"}, "rules: was 'flexlora,fedit', is 'flexlora'"),
        ({"rules": "fedit,flexlora"}, "rules: was 'flexlora,fedit', is 'fedit,flexlora'"),
        ({"rules": "flexlora:delta,flexlora,fedit"}, "rules: was"),
        ({"seeds": 1}, "seeds: was 2, is 1"),
        ({"tune": True}, "rates: was 'not tuned: 0.002', is 'tuned over 0.00067, 0.002, 0.006'"),
    ],
)
def test_another_request_is_refused_naming_what_differs(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        request(**change).continues(request(), Path("out"))
    assert words in str(error.value)
    assert "polyrank resume out" in str(error.value)


def test_a_control_may_be_added_but_not_exchanged() -> None:
    before = request(control="T1")
    with pytest.raises(RecipeError, match="control: was 'T1', is None"):
        request().continues(before, Path("out"))
    with pytest.raises(RecipeError, match="control: was 'T1', is 'T2'"):
        request(control="T2").continues(before, Path("out"))


def test_every_field_is_written(tmp_path: Path) -> None:
    request(control="T1", tune=True).save(tmp_path)
    text = (tmp_path / "comparison.toml").read_text()
    assert all(field.name in text for field in dataclasses.fields(Request))
