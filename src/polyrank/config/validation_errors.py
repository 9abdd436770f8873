"""What is wrong with a recipe, in words: the key, what was expected, what came."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from polyrank.config.section import Expected, Section

_WORDS: Mapping[Any, tuple[str, str]] = {
    str: ("a string", "strings"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}


def mistakes(
    recipe: type[Section],
    content: Mapping[str, Any],
    error: ValidationError,
    noun: str = "a recipe",
) -> list[str]:
    """Return one line for each key that is wrong; `noun` is what has the keys."""
    lines: dict[str, str] = {}
    for item in error.errors():
        where, field = locate(recipe, item["loc"])
        lines.setdefault(where, f"{where}: {_explain(recipe, content, item, where, field, noun)}")
    return list(lines.values())


def locate(recipe: type[Section], location: Sequence[str | int]) -> tuple[str, FieldInfo | None]:
    """Return the dotted key of a location, and its field if there is such a key."""
    section: type[Section] | None = recipe
    keys: list[str] = []
    field: FieldInfo | None = None
    for part in location:
        if section is None:
            break
        keys.append(str(part))
        field = section.model_fields.get(str(part))
        section = subsection(field) if field else None
    return ".".join(keys), field


def subsection(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, or None if it holds a value."""
    options = (field.annotation, *get_args(field.annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def keys(section: type[Section], before: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key with its field, sections left out."""
    for name, field in section.model_fields.items():
        inner = subsection(field)
        if inner is None:
            yield before + name, field
        else:
            yield from keys(inner, f"{before}{name}.")


def words(field: FieldInfo) -> str:
    """Return what a key takes, in words."""
    told = [item.words for item in field.metadata if isinstance(item, Expected)]
    if told:
        return told[0]
    section = subsection(field)
    return "a section" if section else _type(field.annotation)


def _type(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation][0]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (list, dict):
        kind = "list" if origin is list else "table"
        return f"a {kind} of {_plural(arguments[-1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not types.NoneType)
    raise TypeError(f"no words for {annotation}; give the key an Expected")


def _plural(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation][1]
    return f"lists of {_plural(get_args(annotation)[0])}"


def _explain(
    recipe: type[Section],
    content: Mapping[str, Any],
    item: Any,
    where: str,
    field: FieldInfo | None,
    noun: str,
) -> str:
    if field is None:
        return f"unknown key; {_suggestion(recipe, where, noun)}"
    if item["type"] == "missing":
        what = f"section [{where}]" if subsection(field) else f"key {where}"
        return f"missing; {noun} must have the {what}"
    value = _at(content, where)
    if item["type"] == "greater_than_equal":
        return f"expected at least {item['ctx']['ge']}, got {_shown(value)}"
    if item["type"] == "finite_number":
        return f"expected a finite number, got {_shown(value)}"
    return f"expected {words(field)}, got {_shown(value)}{_quotes(field, value)}"


def _suggestion(recipe: type[Section], where: str, noun: str) -> str:
    """A key of that name elsewhere, or the nearest of the section, or all of the section."""
    *path, last = where.split(".")
    section = recipe
    for name in path:
        section = subsection(section.model_fields[name]) or section
    elsewhere = [key for key, _ in keys(recipe) if key.rpartition(".")[2] == last]
    near = difflib.get_close_matches(last, section.model_fields, 1, 0.6)
    meant = elsewhere or [".".join([*path, name]) for name in near]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    here = f"[{'.'.join(path)}]" if path else noun
    return f"{here} has {', '.join(section.model_fields)}"


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


def _quotes(field: FieldInfo, value: Any) -> str:
    """A hint where a number or a truth value was put into quotes."""
    wanted = {field.annotation, *get_args(field.annotation)} & {int, float, bool}
    if not wanted or not isinstance(value, str):
        return ""
    plain = value.strip().lower()
    bare = plain.lstrip("+-").replace(".", "", 1).replace("e-", "", 1).isdigit()
    return "; leave the quotes out" if bare or plain in ("true", "false") else ""
