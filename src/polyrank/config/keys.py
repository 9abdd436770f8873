"""The keys of a TOML file, read off the settings classes that it is validated against."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, get_args, get_origin

from polyrank.settings import Expected, choices, metadata, parts_of, types_of

_WORDS: Mapping[Any, tuple[str, str]] = {
    str: ("a string", "strings"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}


@dataclass(frozen=True)
class Key:
    """A key of a section: a field of the class `owner`."""

    name: str
    owner: type
    annotation: Any
    field: dataclasses.Field[Any]

    @property
    def required(self) -> bool:
        """Whether the key must be given."""
        return self.default is dataclasses.MISSING

    @property
    def default(self) -> Any:
        """Return the value where the key is left out."""
        make = self.field.default_factory
        return self.field.default if make is dataclasses.MISSING else make()

    @cached_property
    def section(self) -> type | None:
        """The settings class that the key holds, or None if it holds a value."""
        return next((part for part in parts_of(self.annotation) if _is_settings(part)), None)

    @property
    def words(self) -> str:
        """What the key takes, in words."""
        told = [item.words for item in metadata(self.annotation) if isinstance(item, Expected)]
        if told:
            return told[0] if isinstance(told[0], str) else told[0]()
        names = choices(self.annotation)
        if names:
            return "one of " + ", ".join(map(repr, names))
        return "a section" if self.section else _type(self.annotation)

    @property
    def takes_many(self) -> bool:
        """Whether the key takes a list or a table."""
        return any(get_origin(part) in (list, tuple, dict) for part in parts_of(self.annotation))

    @property
    def meaning(self) -> str:
        """The text below the field, in one line."""
        of_class = (_texts(owner) for owner in self.owner.__mro__ if _is_settings(owner))
        text = next((texts[self.name] for texts in of_class if self.name in texts), "")
        return " ".join(text.split())


@lru_cache
def keys_of(settings: type) -> dict[str, Key]:
    """Return the keys of a section, or of the whole file, by name."""
    hints = types_of(settings)
    return {
        field.name: Key(field.name, settings, hints[field.name], field)
        for field in dataclasses.fields(settings)
    }


def all_keys(settings: type, before: str = "") -> Iterator[tuple[str, Key]]:
    """Yield every dotted key, sections left out."""
    for name, key in keys_of(settings).items():
        if key.section is None:
            yield before + name, key
        else:
            yield from all_keys(key.section, f"{before}{name}.")


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _type(annotation: Any) -> str:
    words = []
    for part in parts_of(annotation):
        origin, arguments = get_origin(part), get_args(part)
        if part in _WORDS:
            words.append(_WORDS[part][0])
        elif origin in (list, tuple, dict):
            kind = "table" if origin is dict else "list"
            words.append(f"a {kind} of {_plural(arguments[-1 if origin is dict else 0])}")
        elif part is not types.NoneType:
            raise TypeError(f"no words for {part}; give the key an Expected")
    return " or ".join(words)


def _plural(annotation: Any) -> str:
    (part,) = parts_of(annotation)
    return _WORDS[part][1] if part in _WORDS else f"lists of {_plural(get_args(part)[0])}"


@lru_cache
def _texts(settings: type) -> dict[str, str]:
    """Return the text below each field in the source of a class, without those of its bases."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    return {
        before.target.id: text.value.value
        for before, text in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
