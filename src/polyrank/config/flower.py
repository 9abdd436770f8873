"""A recipe as the run config of a Flower app, and back.

A run config is flat: dotted keys with truth values, numbers and texts. Every key of the recipe is
in it, because Flower lets a user change only keys that are there. What the recipe leaves out is the
empty text; lists and tables are TOML texts, such as ``{T1 = 4, T2 = 16}``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyrank.config.app import OWN, PLACE, Scalar
from polyrank.config.baselines import BASELINES
from polyrank.config.keys import Key, all_keys, keys_of
from polyrank.config.reading import PAIRS, checked, listed, resolve_sources
from polyrank.config.recipe import Recipe
from polyrank.errors import RecipeError

RunConfig = Mapping[str, Scalar]

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "plan": ("cuts",),
    "benchmark": ("validation", "test"),
    "early_stopping": ("patience",),
}
"""Of each section that a recipe may lack, the keys with one of which it is there."""

_KEYS: Mapping[str, Key] = dict(all_keys(Recipe))
_BY_BASELINES = {
    key for baseline in BASELINES.values() for key in (*baseline.fixed, *baseline.default)
}
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_run_config(recipe: Recipe) -> dict[str, Scalar]:
    """Return every key of a recipe, defaults written out; the empty text: left out.

    Left out is also what a baseline sets, or would set if one were chosen: so another baseline can
    be chosen without a contradiction.
    """
    given = {key: value for key, value in _values(recipe) if not _by_baseline(recipe, key, value)}
    return {
        name: "" if given.get(name) is None else _written(key, given[name])
        for name, key in _KEYS.items()
    }


def from_run_config(flat: RunConfig, *, at_server: bool = True) -> Recipe:
    """Return the recipe that a run config stands for, checked as `polyrank.config.read` does.

    The app's own keys are passed over, keys that are missing are left out. Raises RecipeError for
    unknown keys, for a recipe that cannot be, and for both keys of a pair of which a recipe gives
    one: which of them is the newer does not show. Away from the server the rule is not built.
    """
    mistakes = [
        f"{key}: unknown key{_nearest(key, _KEYS)}"
        for key in flat
        if key not in _KEYS and not key.startswith(OWN)
    ]
    given = {
        name: read_value(key, flat[name]) for name, key in _KEYS.items() if flat.get(name, "") != ""
    }
    mistakes += _both(given)
    for section, switches in SWITCHES.items():
        mistakes += _switched_off(given, section, switches)
    if mistakes:
        raise RecipeError(listed(PLACE, mistakes))
    content = nested(given)
    for name in ("model", "data", "fleet"):
        content.setdefault(name, {})
    resolve_sources(content, Path())
    return checked(content, PLACE, at_server=at_server)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of dotted keys, plain keys first, as TOML needs them."""
    content: dict[str, Any] = {}
    for key, value in sorted(flat.items(), key=lambda item: "." in item[0]):
        *sections, last = key.split(".")
        inside = content
        for name in sections:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return content


def read_value(key: Key, written: Scalar) -> Any:
    """Return what a value of a run config stands for, at this key.

    A text in quotes is what is in them, and one in brackets or braces is the list or table where
    the key takes one; everything else stands for itself.
    """
    if not isinstance(written, str) or written[:1] not in ("'", '"', "[", "{"):
        return written
    try:
        content = tomllib.loads(f"value = {written}")
    except tomllib.TOMLDecodeError:
        return written
    value = content["value"] if len(content) == 1 else written
    return value if isinstance(value, str) or key.takes_many else written


def _values(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every key with its value; without those of sections that the recipe lacks."""
    for name, key in keys_of(Recipe).items():
        value = getattr(recipe, name)
        if key.section is None:
            yield name, value
        elif value is not None:
            for inner in keys_of(key.section):
                yield f"{name}.{inner}", getattr(value, inner)


def _by_baseline(recipe: Recipe, key: str, value: Any) -> bool:
    """Whether a baseline is to say what the key is, when the recipe is read back."""
    if key not in _BY_BASELINES:
        return False
    own = BASELINES.get(recipe.baseline or "")
    if own is not None and key in (said := {**own.default, **own.fixed}):
        return bool(said[key] == value)
    return bool(value == _KEYS[key].default)


def _written(key: Key, value: Any) -> Scalar:
    """Write a value so that `read_value` returns it."""
    if isinstance(value, str):
        plain = value != "" and read_value(key, value) == value
        return value if plain else _toml(value)
    return _toml(value) if isinstance(value, list | tuple | dict) else value


def _toml(value: Any) -> str:
    """A value as TOML in one line."""
    if isinstance(value, dict):
        inside = (f"{_key(name)} = {_toml(item)}" for name, item in value.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):  # JSON's texts are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _toml(name)


def _both(given: Mapping[str, Any]) -> list[str]:
    return [
        f"{a} = {given[a]!r} and {b} = {given[b]!r}: a recipe gives one of the two; take the other "
        f"back, -c '{a}=\"\"' or -c '{b}=\"\"'"
        for a, b in PAIRS
        if a in given and b in given
    ]


def _switched_off(given: dict[str, Any], section: str, switches: tuple[str, ...]) -> list[str]:
    """Remove a switched-off section from `given`; return what to say of its changed keys."""
    inside = [key for key in given if key.startswith(f"{section}.")]
    names = [f"{section}.{name}" for name in switches]
    if any(name in given for name in names):
        return []
    mistakes = [
        f"{key} = {given[key]!r}: [{section}] is switched off for want of {' or '.join(names)}; "
        f"give it, or take this key back: -c '{key}=\"\"'"
        for key in inside
        if given[key] != _KEYS[key].default
    ]
    for key in inside:
        del given[key]
    return mistakes


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1) or [
        candidate for candidate in known if candidate.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"; did you mean {near[0]}?" if near else "; docs/reference/recipes.md has all"
