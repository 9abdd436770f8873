"""From a TOML file and ``key=value`` overrides to a validated recipe."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.aggregation.custom import code_beside
from polyrank.config.baselines import with_baseline
from polyrank.config.data import CLIENT
from polyrank.config.recipe import Recipe
from polyrank.config.validation_errors import validated
from polyrank.errors import PolyrankError, RecipeError
from polyrank.sample import SAMPLE

PAIRS = (
    ("local.epochs", "local.steps"),
    ("sampling.fraction", "sampling.number"),
    ("fleet.distribution", "fleet.clients"),
)
"""Keys of which a recipe gives one: an override of one takes the other back."""

SOURCES = (
    ("model", "source"),
    ("data", "source"),
    ("fleet", "trace"),
    ("benchmark", "validation"),
    ("benchmark", "test"),
)
"""Keys that may hold a path."""

_RESERVED = {("model", "source"): (SAMPLE,), ("data", "source"): (SAMPLE, CLIENT)}
"""What is no path there."""

SHIPPED: Mapping[str, Path] = {
    path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
}
"""The recipes that come with polyrank, by name."""

_OTHER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a file or the name of one of `SHIPPED`, and apply ``key=value`` overrides.

    A file of that name comes before a shipped recipe.
    Values are TOML (``local.lr=1e-3``, ``fleet.types={T1 = 4}``); what is not valid TOML is taken
    as a string (``control=weakest``), and nothing (``control=``) takes a key back to its default.
    Folders and files are looked for beside the recipe, then here; those of overrides only here. A
    rule of the user's own (``module:Class``) is imported only within `code_allowed`.

    Raises RecipeError for a missing or malformed file, unknown keys (with the nearest known one),
    wrong types and impossible values, all that are found at once.
    """
    file = _file(Path(path))
    place = f"recipe {path}"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{place}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{place}: not valid TOML: {error}") from error
    resolve_sources(content, file.parent, Path())
    code_beside(str(file.parent.resolve()))
    for override in overrides:
        _override(content, override)
    resolve_sources(content, Path())
    return checked(content, place)


def _file(path: Path) -> Path:
    """Return the file of a recipe; RecipeError with the shipped names if there is none."""
    if path.is_file():
        return path
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
    if path.is_dir():
        raise RecipeError(f"recipe {path}: expected a TOML file, got a folder")
    near = difflib.get_close_matches(path.stem, SHIPPED, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"recipe {path}: no such file, and no recipe of polyrank has this name{hint}\n"
        f"Give the path of a TOML file, or one of {', '.join(SHIPPED)}"
    )


def checked(content: Mapping[str, Any], place: str, *, at_server: bool = True) -> Recipe:
    """Return the recipe, validated, and its parts built once; RecipeError as for `read`.

    Away from the server the rule is not built: its code need not be there.
    """
    recipe = parse(content, place)
    try:
        recipe.check(at_server=at_server)
    except PolyrankError as error:
        raise RecipeError(f"{place}: {error}") from error
    return recipe


def parse(content: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """Return the validated recipe; RecipeError lists every mistake in it."""
    conflicts = [
        f"{a.partition('.')[0]}: give {_last(a)} or {_last(b)}, not both"
        for a, b in PAIRS
        if _find(content, a) is not None and _find(content, b) is not None
    ]
    content, contradictions = with_baseline(content)
    recipe, mistakes = validated(Recipe, content)
    if recipe is None or conflicts or contradictions:
        raise RecipeError(listed(place, [*dict.fromkeys([*mistakes, *conflicts, *contradictions])]))
    return recipe


def listed(place: str, found: Sequence[str]) -> str:
    """Return one message of all mistakes."""
    return f"{place}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{place}:", *found])


def _override(content: dict[str, Any], override: str) -> None:
    """Place one ``key=value``; an empty value takes the key away."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(key.split(".")):
        raise RecipeError(f"override {override!r}: expected key=value, e.g. local.lr=1e-3")
    *names, last = key.split(".")
    section = content
    for name in names:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {name} is a value, not a section")
    if not text:
        section.pop(last, None)
        return
    section[last] = toml_value(text)
    if (other := _OTHER.get(key)) is not None:
        section.pop(_last(other), None)


def toml_value(text: str) -> Any:
    """Return what a text says in TOML, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def resolve_sources(content: Mapping[str, Any], *places: Path) -> None:
    """Make a source that exists in one of the places an absolute path; others stay as they are."""
    for name, key in SOURCES:
        section = content.get(name)
        source = section.get(key) if isinstance(section, dict) else None
        reserved = ("", *_RESERVED.get((name, key), ()))
        if isinstance(section, dict) and isinstance(source, str) and source not in reserved:
            paths = (place / Path(source).expanduser() for place in places)
            section[key] = next((str(p.resolve()) for p in paths if p.exists()), source)


def _find(content: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _last(key: str) -> str:
    return key.rpartition(".")[2]
