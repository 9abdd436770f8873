import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank import config
from polyrank.config import Recipe
from polyrank.config.app import APP_KEYS, app_settings
from polyrank.config.flower import RunConfig, from_run_config, nested, to_run_config
from polyrank.config.keys import all_keys
from polyrank.config.reading import SHIPPED
from polyrank.config.reference import app_page
from polyrank.errors import RecipeError

RECIPES = list(SHIPPED.values())
MINIMAL: dict[str, Any] = {
    "model": {"source": "sample"},
    "data": {"source": "sample"},
    "fleet": {"distribution": "uniform"},
}


def recipe_of(**sections: Any) -> Recipe:
    merged = {
        name: {**MINIMAL.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return config.parse({**MINIMAL, **merged})


def mistake(flat: RunConfig) -> str:
    with pytest.raises(RecipeError) as caught:
        from_run_config(flat)
    return str(caught.value)


def changed(recipe: Recipe, **values: Any) -> dict[str, Any]:
    """As ``flwr run -c`` does: the key must be there."""
    flat = to_run_config(recipe)
    for name, value in values.items():
        key = name.replace("__", ".")
        assert key in flat
        flat[key] = value
    return flat


def through_toml(flat: RunConfig) -> dict[str, Any]:
    """As Flower reads it: tables flattened, nothing but scalars in them."""

    def flatten(table: dict[str, Any], before: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in table.items():
            if isinstance(value, dict):
                found |= flatten(value, f"{before}{key}.")
            else:
                assert isinstance(value, bool | int | float | str)
                found[before + key] = value
        return found

    return flatten(tomllib.loads(tomli_w.dumps(nested(flat))), "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_comes_back_from_its_run_config(path: Path) -> None:
    recipe = config.read(path)
    flat = to_run_config(recipe)
    again = through_toml({**flat, **APP_KEYS})
    assert again == {**flat, **APP_KEYS}
    assert from_run_config(again) == recipe


def test_every_key_of_a_recipe_is_there_to_be_changed() -> None:
    assert list(to_run_config(recipe_of())) == [key for key, _ in all_keys(Recipe)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
AWKWARD = st.sampled_from(["", '""', "''", "[]", "{}", "{a = 1}", '"x"', "[1, 2]", "\x7f", "a\nb"])
WORDS = TEXT | AWKWARD


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": WORDS,
            "seed": st.integers(-(2**63), 2**63 - 1),
            "target_loss": st.floats(0.1, 10),
            "devices": st.dictionaries(TEXT, st.just({"memory": "1 GiB", "up": 5, "flops": 1e-7})),
            "model": st.fixed_dictionaries(
                {},
                optional={
                    "revision": WORDS,
                    "sites": WORDS | st.lists(WORDS),
                    "exclude": st.lists(WORDS),
                    "groups": st.dictionaries(WORDS, st.lists(WORDS)),
                    "checkpointing": st.booleans(),
                },
            ),
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "separator": WORDS,
                    "prompt": WORDS,
                    "completion": WORDS,
                    "unseen": WORDS | st.lists(WORDS) | st.integers(0, 9) | st.floats(0, 1),
                    "limit": st.integers(1, 99),
                },
            ),
            "early_stopping": st.fixed_dictionaries(
                {"patience": st.integers(1, 9)}, optional={"min_delta": st.floats(0, 1)}
            ),
            "benchmark": st.fixed_dictionaries(
                {"test": st.just("no such file")}, optional={"test_split": WORDS}
            ),
        },
    )
)
def test_any_recipe_comes_back_from_its_run_config(sections: dict[str, Any]) -> None:
    recipe = recipe_of(**sections)
    assert from_run_config(through_toml(to_run_config(recipe))) == recipe


def test_lists_and_tables_are_texts_in_toml() -> None:
    recipe = recipe_of(
        fleet={"types": {"T1": 4, "two words": {"attention": 2}}, "distribution": {"T1": 1.0}},
        data={"unseen": ["a", 'b"']},
    )
    flat = to_run_config(recipe)
    assert flat["fleet.types"] == '{T1 = 4, "two words" = {attention = 2}}'
    assert flat["data.unseen"] == '["a", "b\\""]'
    assert flat["data.fractions"] == "[0.8, 0.1, 0.1]"


def test_brackets_are_text_where_a_key_takes_no_list() -> None:
    again = from_run_config(changed(recipe_of(), data__separator="[1]", data__prompt="{a = 1}"))
    assert (again.data.separator, again.data.prompt) == ("[1]", "{a = 1}")


def test_what_is_left_out_is_the_empty_text() -> None:
    flat = to_run_config(recipe_of())
    assert {flat[key] for key in ("control", "local.steps", "fleet.force")} == {""}
    assert {flat[key] for key in flat if key.startswith(("plan.", "benchmark."))} == {""}


def test_an_empty_text_takes_a_key_back_to_its_default() -> None:
    recipe = recipe_of(rounds=3, local={"lr": 1.0, "steps": 5})
    again = from_run_config(changed(recipe, rounds="", local__lr="", local__steps=""))
    assert again == recipe_of()


def test_both_of_a_pair_are_refused_with_how_to_take_one_back() -> None:
    flat = changed(recipe_of(local={"epochs": 1}), local__steps=3)
    said = mistake(flat)
    assert "local.epochs = 1.0 and local.steps = 3" in said
    assert """-c 'local.epochs=""'""" in said
    assert from_run_config({**flat, "local.epochs": ""}).local.steps == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"local.lrr": 1}, "local.lrr: unknown key; did you mean local.lr?"),
        ({"lr": 1}, "lr: unknown key; did you mean local.lr?"),
        ({"rounds": "x"}, "rounds: expected a whole number, got the string 'x'"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"local.lr": -1.0}, "local.lr: expected more than 0"),
        ({"fleet.clients": "{a = T1}", "fleet.distribution": ""}, "got the string '{a = T1}'"),
        ({"model.source": ""}, "model.source: missing; a recipe must have the key model.source"),
        ({"fleet.distribution": ""}, "give either distribution"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], said: str) -> None:
    message = mistake({**to_run_config(recipe_of()), **change})
    assert message.startswith("run config: ")
    assert said in message


def test_all_unknown_keys_are_told_at_once() -> None:
    message = mistake({**to_run_config(recipe_of()), "local.lrr": 1, "wrong": 2})
    assert "local.lrr" in message
    assert "wrong" in message


def test_a_section_is_switched_on_by_its_key() -> None:
    planned = changed(
        recipe_of(),
        plan__cuts="best",
        fleet__distribution="{t4 = 1.0}",
        early_stopping__patience=2,
        benchmark__test="no such file",
    )
    again = from_run_config(planned)
    assert again.plan is not None
    assert again.early_stopping is not None
    assert again.benchmark is not None
    assert from_run_config(to_run_config(recipe_of())).plan is None


def test_a_section_is_switched_off_by_its_key_alone_where_the_rest_is_default() -> None:
    recipe = recipe_of(plan={}, fleet={"distribution": {"t4": 1.0}})
    assert from_run_config(to_run_config(recipe)).plan is not None
    off = changed(recipe, plan__cuts="", fleet__distribution="uniform")
    assert from_run_config(off).plan is None


def test_a_key_of_a_section_that_is_off_is_not_lost_silently() -> None:
    said = mistake(changed(recipe_of(), plan__levels="[1, 2]"))
    assert "plan.levels = [1, 2]: [plan] is switched off for want of plan.cuts" in said
    said = mistake(changed(recipe_of(), early_stopping__min_delta=0.5))
    assert "early_stopping.min_delta" in said


@pytest.mark.parametrize("one", ["fedlora", "hetlora", "ft"])
@pytest.mark.parametrize("other", ["cenlora", "hetlora"])
def test_another_baseline_can_be_chosen(one: str, other: str) -> None:
    assert from_run_config(changed(recipe_of(), baseline=one)) == recipe_of(baseline=one)
    again = from_run_config(changed(recipe_of(baseline=one), baseline=other))
    assert again == recipe_of(baseline=other)


def test_a_key_that_contradicts_a_baseline_is_refused() -> None:
    recipe = recipe_of(aggregation={"rule": "flexlora"})
    said = mistake(changed(recipe, baseline="hetlora"))
    assert "contradict each other" in said


def test_a_relative_source_is_seen_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    again = from_run_config(changed(recipe_of(), data__source="rows.jsonl"))
    assert again.data.source == str(tmp_path / "rows.jsonl")


def test_data_may_lie_with_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client").mkdir()  # A folder of that name is not meant.
    monkeypatch.chdir(tmp_path)
    flat = changed(recipe_of(), data__source="client")
    recipe = from_run_config(flat)
    assert recipe.data.source == "client"
    with pytest.raises(RecipeError, match="polyrank app RECIPE DIR"):
        recipe.clients()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.by", "iid"),
        ("data.clients", 3),
        ("data.alpha", 0.1),
        ("data.unseen", 0),
        ("data.min_examples", 2),
        ("data.pooled", True),
        ("data.prompt", "question"),
        ("data.format", "csv"),
    ],
)
def test_keys_that_deal_or_read_one_source_are_refused_with_data_at_clients(
    key: str, value: Any
) -> None:
    flat = changed(recipe_of(), data__source="client")
    assert f"{key}: has no meaning with data.source = 'client'" in mistake({**flat, key: value})


def test_data_at_clients_goes_with_what_all_clients_share() -> None:
    shared = {"max_length": 64, "template": "plain", "fractions": [0.5, 0.25, 0.25], "limit": 9}
    recipe = recipe_of(data={"source": "client", **shared})
    recipe.check()
    assert from_run_config(to_run_config(recipe)) == recipe


def test_a_benchmark_is_read_as_data_says_even_with_data_at_clients() -> None:
    recipe = recipe_of(
        data={"source": "client", "format": "csv"}, benchmark={"test": "no such file"}
    )
    assert from_run_config(to_run_config(recipe)) == recipe


def test_the_page_of_the_apps_own_keys_is_up_to_date() -> None:
    """Made by ``python -m polyrank.config.reference app > docs/reference/app.md``."""
    page = Path(__file__).parents[3] / "docs" / "reference" / "app.md"
    assert page.read_text(encoding="utf-8") == app_page()


def test_the_apps_own_keys_have_defaults() -> None:
    settings = app_settings(APP_KEYS)
    assert settings == app_settings({})
    assert settings.wait == 300
    assert "app.allow-inexact" in APP_KEYS


def test_the_apps_own_keys_are_read() -> None:
    settings = app_settings(
        {
            "rounds": 3,
            "app.out": "there",
            "app.allow-inexact": True,
            "app.wait": "",
            "app.split.listen": "0.0.0.0:99",
            "app.split.address": "[::1]",
        }
    )
    assert settings.out == "there"
    assert settings.allow_inexact
    assert settings.wait == 300
    assert settings.split.address == "[::1]"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("app.wiat", 1, "app.wiat: unknown key; did you mean app.wait?"),
        ("app.wait", -1.0, "app.wait: expected at least 0, got -1.0"),
        ("app.clients", 1.5, "app.clients: expected a whole number, got 1.5"),
        ("app.resume", True, "app.resume: give app.out too"),
        ("app.allow-inexact", 1, "app.allow-inexact: expected true or false, got 1"),
        ("app.split.silence", 0.0, "app.split.silence: expected more than 0, got 0.0"),
        ("app.split.listen", "localhost", "app.split.listen: expected host:port"),
        ("app.split.listen", "localhost:99999", "app.split.listen: expected host:port"),
        ("app.split.listen", "0.0.0.0:99", "app.split.address: 0.0.0.0:99 is every address"),
        ("app.split.address", ":99", "app.split.address: expected host or host:port"),
    ],
)
def test_a_mistake_in_the_apps_own_keys_is_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        app_settings({**APP_KEYS, key: value})
    assert said in str(caught.value)
