"""Rules that a recipe names as ``module:Class``: code of the user's own, run only where allowed."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from importlib.abc import SourceLoader
from importlib.machinery import PathFinder
from typing import Any

from polyrank.aggregation.rule import Rule
from polyrank.errors import RuleError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Z]\w*")
_FOLDERS: ContextVar[list[str] | None] = ContextVar("folders", default=None)


def is_custom(name: str) -> bool:
    """Whether a rule's name is of the form ``module:Class``.

    The class begins with a capital letter, which no part of a name of polyrank's own does.
    """
    return _NAME.fullmatch(name) is not None


@contextmanager
def code_allowed(*folders: str) -> Iterator[None]:
    """Let rules of the form ``module:Class`` be imported while the context is entered.

    Modules are looked for where Python looks for them, and last in these folders, so that nothing
    in them takes the place of an installed module; a recipe that is read meanwhile adds its own
    folder. What is imported runs with all rights of the process: allow it for recipes that you
    trust, as you would run a script.
    """
    before, token = [*sys.path], _FOLDERS.set([])
    try:
        for folder in reversed(folders):
            code_beside(folder)
        yield
    finally:
        added = _FOLDERS.get() or []
        _FOLDERS.reset(token)
        sys.path[:] = [p for p in sys.path if p in before or p not in added]


def code_beside(folder: str) -> None:
    """Where code is allowed, let it be looked for in this folder too, before the others."""
    folders = _FOLDERS.get()
    if folders is not None and folder not in folders:
        first = next((i for i, path in enumerate(sys.path) if path in folders), len(sys.path))
        folders.insert(0, folder)
        if folder not in sys.path:
            sys.path.insert(first, folder)


def custom_rule(name: str, options: Mapping[str, Any]) -> Rule:
    """Return the rule whose class a name gives; `options` are values of its fields.

    Raises RuleError, with nothing imported, unless the context of `code_allowed` is entered; and
    for a module that cannot be imported, a class that is no whole `Rule`, and unknown options.
    """
    kind = _class(name)
    own: set[str] = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    excess = sorted(options.keys() - own)
    if excess:
        has = f"it has {sorted(own)}" if own else "it has none"
        raise RuleError(f"rule {name!r} has no option {excess[0]!r} ({has}); leave it out")
    try:
        return kind(**options)
    except TypeError as error:
        raise RuleError(f"rule {name!r}: {error}; give every field a default") from error


def _class(name: str) -> type[Rule]:
    folders = _FOLDERS.get()
    if folders is None:
        raise RuleError(
            f"rule {name!r} is code that comes with the recipe, and nothing of it was run; if you "
            "trust it, allow it: --allow-code on the command line, app.allow-code in a Flower app, "
            "polyrank.aggregation.code_allowed from Python"
        )
    module_name, _, class_name = name.partition(":")
    place = f"rule {name!r}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in (module_name, module_name.partition(".")[0]):
            raise RuleError(f"{place}: module {module_name!r} needs {error.name!r}") from error
        raise RuleError(
            f"{place}: expected a module {module_name!r} that is installed or in one of "
            f"{folders}; there is none"
        ) from None
    except Exception as error:
        raise RuleError(
            f"{place}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    _check_origin(place, module_name, getattr(module, "__file__", None), folders)
    kind = getattr(module, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, Rule)):
        raise RuleError(
            f"{place}: expected a class {class_name} derived from polyrank.aggregation.Rule in "
            f"{module.__file__}, got {'nothing' if kind is None else repr(kind)}"
        )
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise RuleError(f"{place}: {class_name} lacks {missing}; define them")
    return kind


def _check_origin(place: str, name: str, loaded: str | None, folders: list[str]) -> None:
    """Raise RuleError if another module of that name, with other contents, is in the folders."""
    spec = PathFinder.find_spec(name.partition(".")[0], folders)
    if spec is None or spec.origin is None or "." in name or spec.origin == loaded:
        return
    if isinstance(spec.loader, SourceLoader) and loaded is not None:
        with suppress(OSError):
            if spec.loader.get_data(spec.origin) == spec.loader.get_data(loaded):
                return
    raise RuleError(
        f"{place}: module {name!r} is imported from {loaded} already, and there is another one at "
        f"{spec.origin}; give it a name that no other module has"
    )
