import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from polyrank.config.keys import all_keys
from polyrank.config.reading import SHIPPED
from polyrank.config.reference import client_page
from polyrank.config.schema import FOLDER, SCHEMAS, directive, schema

VALIDATE = {name: jsonschema.Draft7Validator(json.loads(schema(name))) for name in SCHEMAS}
RECIPES = SHIPPED.values()
MINIMAL: dict[str, Any] = {"model": {"source": "m"}, "data": {"source": "d"}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_up_to_date(name: str) -> None:
    """Made by ``python -m polyrank.config.schema``."""
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == schema(name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_keeps_its_schema_and_names_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    VALIDATE["recipe"].validate(tomllib.loads(text))
    named = text.splitlines()[0].removeprefix("#:schema ")
    assert (path.parent / named).resolve() == FOLDER / "recipe.json"


def test_the_example_of_a_client_keeps_its_schema() -> None:
    _, _, rest = client_page().partition("```toml\n")
    VALIDATE["client"].validate(tomllib.loads(rest.partition("```")[0]))


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("local", {"lrr": 1}),
        ("local", {"lr": 0}),
        ("local", {"schedule": "exponential"}),
        ("local", {"betas": [0.9]}),
        ("plan", {"importance": "paper", "every": 0}),
        ("aggregation", {"max_share": 2}),
        ("model", {}),
    ],
)
def test_what_a_recipe_refuses_the_schema_refuses(section: str, wrong: dict[str, Any]) -> None:
    assert VALIDATE["recipe"].is_valid(MINIMAL)
    assert not VALIDATE["recipe"].is_valid({**MINIMAL, section: wrong})


@pytest.mark.parametrize(("name", "kind"), SCHEMAS.items())
def test_every_key_has_a_text(name: str, kind: type) -> None:
    made = json.loads(schema(name))
    for key, _ in all_keys(kind):
        *sections, last = key.split(".")
        at = made
        for section in sections:
            at = made["$defs"][at["properties"][section]["$ref"].rpartition("/")[2]]
        assert at["properties"][last]["description"], key


def test_the_line_for_files_elsewhere_is_a_url() -> None:
    assert directive("recipe") == f"#:schema {(FOLDER / 'recipe.json').as_uri()}"
