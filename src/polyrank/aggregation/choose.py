"""Looking up a name that a user gave."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from polyrank.errors import RuleError

T = TypeVar("T")


def choose(what: str, name: str, among: Mapping[str, T]) -> T:
    """Return the entry, or raise RuleError that lists the names and suggests the nearest."""
    if name in among:
        return among[name]
    near = difflib.get_close_matches(name, among, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RuleError(f"unknown {what} {name!r}: expected one of {sorted(among)}{hint}")
