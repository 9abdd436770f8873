"""From a TOML file's content to settings, or to a line for each key that is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from polyrank.config.keys import Key, all_keys, keys_of
from polyrank.settings import bounds, parts_of

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How files are validated: strict types, no unknown keys, no infinities. The class of a whole file
has it as ``__pydantic_config__``, which holds for its sections too."""

_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validated(
    kind: type[T], content: Mapping[str, Any], noun: str = "a recipe"
) -> tuple[T | None, list[str]]:
    """Return the settings, or None and one line for each mistake; `noun` is what has the keys."""
    # As JSON, in which a list may stand for a tuple. What TOML alone has, such as a date, no key
    # takes: a list with nothing in it stands for it.
    text = json.dumps(content, default=lambda _: [None])
    try:
        return _adapter(kind).validate_json(text), []  # type: ignore[arg-type]
    except ValidationError as error:
        lines: dict[str, str] = {}
        for item in error.errors():
            where, key = _locate(kind, item["loc"])
            told = _explain(kind, content, item, where, key, noun)
            by_itself = item["type"] in ("value_error", "json_invalid")
            lines.setdefault(where, told if by_itself else f"{where}: {told}")
        return None, list(lines.values())


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _locate(kind: type, location: Sequence[str | int]) -> tuple[str, Key | None]:
    """Return the dotted key of a location, and the key itself if it is known."""
    section: type | None = kind
    names: list[str] = []
    key: Key | None = None
    for part in location:
        if section is None:
            break
        names.append(str(part))
        key = keys_of(section).get(str(part))
        section = key.section if key else None
    return ".".join(names), key


def _explain(
    kind: type, content: Mapping[str, Any], item: Any, where: str, key: Key | None, noun: str
) -> str:
    if item["type"] == "value_error":  # The settings themselves say it, and name the key.
        return str(item["ctx"]["error"])
    if item["type"] == "json_invalid":
        return f"not readable: {item['ctx']['error']}"
    if key is None:
        return f"unknown key; {_suggestion(kind, where, noun)}"
    if item["type"] == "missing" and item["loc"][-1] == key.name:
        what = f"section [{where}]" if key.section else f"key {where}"
        return f"missing; {noun} must have the {what}"
    value = _at(content, where)
    if item["type"] in _BOUNDS:
        return f"expected {bounds(key.annotation)}, got {_shown(value)}"
    if item["type"] == "finite_number":
        return f"expected a finite number, got {_shown(value)}"
    within = bounds(key.annotation) if type(value) is int else ""  # A choice of types tells none.
    told = ", ".join(part for part in (key.words, within) if part)
    return f"expected {told}, got {_shown(value)}{_quotes(key, value)}"


def _suggestion(kind: type, where: str, noun: str) -> str:
    """A key of that name elsewhere, or the nearest of the section, or all of the section."""
    *path, last = where.split(".")
    section = kind
    for name in path:
        section = keys_of(section)[name].section or section
    known = keys_of(section)
    elsewhere = [key for key, _ in all_keys(kind) if key.rpartition(".")[2] == last]
    near = difflib.get_close_matches(last, known, 1, 0.6)
    meant = elsewhere or [".".join([*path, name]) for name in near]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    here = f"[{'.'.join(path)}]" if path else noun
    return f"{here} has {', '.join(known)}"


def _at(content: Any, where: str) -> Any:
    for name in where.split("."):
        content = content[name]
    return content


def _shown(value: Any) -> str:
    """A value as TOML would have it, with its kind where that is the mistake."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, dict):
        return f"the table {value}"
    if isinstance(value, list):
        return f"the list {value}"
    return repr(value)


def _quotes(key: Key, value: Any) -> str:
    """A hint where a number or a truth value was put into quotes."""
    if not isinstance(value, str) or not {*parts_of(key.annotation)} & {int, float, bool}:
        return ""
    plain = value.strip().lower()
    bare = plain.lstrip("+-").replace(".", "", 1).replace("e-", "", 1).isdigit()
    return "; leave the quotes out" if bare or plain in ("true", "false") else ""
