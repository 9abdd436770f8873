"""The keys in which two recipes differ."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from polyrank.config.recipe import Recipe


def differences(before: Recipe, now: Recipe) -> list[tuple[str, Any, Any]]:
    """Return every dotted key that differs, with its value in either recipe.

    Defaults count as written out; None stands for a key or a section that a recipe leaves out.
    """
    return [*_differing(tomllib.loads(before.to_toml()), tomllib.loads(now.to_toml()))]


def _differing(
    before: Mapping[str, Any], now: Mapping[str, Any], section: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{section}{name}.")
        elif old != new:
            yield f"{section}{name}", old, new
