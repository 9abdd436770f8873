"""The common base of all settings: the values that a field takes, and how a run stores them.

Settings are frozen dataclasses beside the code that uses them, with the names, defaults and texts
that a recipe has. Bounds are annotations (`annotated_types`), choices are `OneOf` a registry.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from polyrank.errors import RecipeError

T = TypeVar("T")

LONGEST_WAIT = 31 * 24 * 3600.0
"""The most seconds for which one machine may keep another waiting, or at work: 31 days."""

_BOUNDS: Mapping[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Gt: ("gt", "more than", operator.gt),
    Ge: ("ge", "at least", operator.ge),
    Lt: ("lt", "less than", operator.lt),
    Le: ("le", "at most", operator.le),
}


class OneOf:
    """An annotation: the field is one of these names, which a registry lists."""

    def __init__(self, names: Iterable[str]):
        self.names = (*names,)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Tell pydantic the choices, when a recipe is read and in its JSON Schema."""
        from pydantic_core import core_schema

        return core_schema.literal_schema([*self.names])


@dataclasses.dataclass(frozen=True)
class Expected:
    """An annotation: what the field takes, in words, where its type alone reads badly.

    A function gives them where they are in a registry that imports the settings.
    """

    words: str | Callable[[], str]


def parts_of(annotation: Any) -> Iterator[Any]:
    """Yield the types that a union is of, or the type itself, without what is annotated to them."""
    if get_origin(annotation) is Annotated:
        yield from parts_of(annotation.__origin__)
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


def metadata(annotation: Any) -> Iterator[Any]:
    """Yield what is annotated to a type, or to the types that a union is of."""
    if get_origin(annotation) is Annotated:
        for item in annotation.__metadata__:
            yield from item if isinstance(item, GroupedMetadata) else (item,)
        yield from metadata(annotation.__origin__)
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from metadata(part)


def bounds(annotation: Any) -> str:
    """Return the bounds of a number in words, such as ``more than 0, at most 1``; empty if none."""
    return ", ".join(f"{word} {limit:.12g}" for word, limit, _ in _bounds(annotation))


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of which a field takes one; empty if it takes others."""
    parts = [part for part in parts_of(annotation) if part is not types.NoneType]
    if len(parts) == 1 and get_origin(parts[0]) is Literal:
        return get_args(parts[0])
    return next((item.names for item in metadata(annotation) if isinstance(item, OneOf)), ())


def types_of(settings: type) -> dict[str, Any]:
    """Return the type of every field, with what is annotated to it."""
    if settings not in _TYPES:
        hints = get_type_hints(settings, include_extras=True)
        _TYPES[settings] = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    return _TYPES[settings]


_TYPES: dict[type, dict[str, Any]] = {}


def check(settings: Any, section: str) -> None:
    """Raise RecipeError, naming section and field, for a value that its annotation excludes."""
    for name, annotation in types_of(type(settings)).items():
        place, value = f"{section}.{name}", getattr(settings, name)
        if value is None:
            continue
        names = choices(annotation)
        if names and value not in names:
            listed = ", ".join(map(repr, names))
            raise RecipeError(f"{place}: expected one of {listed}, got {value!r}")
        if not isinstance(value, int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{place}: expected a finite number, got {value}")
        if float not in {*parts_of(annotation)} and value % 1:
            raise RecipeError(f"{place}: expected a whole number, got {value}")
        if not all(holds(value, limit) for _, limit, holds in _bounds(annotation)):
            raise RecipeError(f"{place}: expected {bounds(annotation)}, got {value}")


def part(kind: type[T], whole: Any) -> T:
    """Return the settings of this kind that a section of more keys holds."""
    return kind(**{name: getattr(whole, name) for name in types_of(kind)})


def stored(settings: Any) -> dict[str, Any]:
    """Return settings as a run folder has them, so that runs of earlier versions go on.

    A field with metadata ``stored`` is stored under that name; one with ``later`` came with a later
    version, and is stored only where it differs from its default.
    """
    plain, entries = dataclasses.asdict(settings), {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not (field.metadata.get("later") and value == field.default):
            inner = dataclasses.is_dataclass(value)
            name = field.metadata.get("stored", field.name)
            entries[name] = stored(value) if inner else plain[field.name]
    return entries


def _bounds(annotation: Any) -> Iterator[tuple[str, Any, Callable[[Any, Any], bool]]]:
    for item in metadata(annotation):
        if type(item) in _BOUNDS:
            key, word, holds = _BOUNDS[type(item)]
            yield word, getattr(item, key), holds
