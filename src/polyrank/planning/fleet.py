"""Fleets: which LoRA ranks every client trains at."""

from __future__ import annotations

import fnmatch
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from polyrank.errors import RankError
from polyrank.planning.spec import ModelSpec, Site

T = TypeVar("T")


@dataclass(frozen=True)
class LoRAType:
    """A kind of client: the LoRA rank of each site, by pattern.

    A key of `ranks` is ``all``, a group (``attention``, ``feed-forward``), or a site: its last
    name (``q_proj``), a glob over full names, or its full name. The most specific key wins: a full
    name over a last name or glob, over a group, over ``all``; two of the same kind that say
    different ranks for a site are refused. A site that no key names is not trained by clients of
    this type.
    """

    name: str
    ranks: Mapping[str, int]

    def resolve(self, spec: ModelSpec) -> dict[str, int]:
        """Return the rank per site.

        Raises RankError for rank 0, a rank above the matrix, a key that matches no site, keys that
        contradict each other, and a type without any site.
        """
        matched: set[str] = set()
        resolved: dict[str, int] = {}
        for site in spec.sites:
            levels = {key: _specificity(key, site) for key in self.ranks}
            matched.update(key for key, level in levels.items() if level)
            top = max(levels.values(), default=0)
            if top:
                keys = sorted(key for key, level in levels.items() if level == top)
                resolved[site.name] = self._agreed(keys, site)
        dead = sorted(set(self.ranks) - matched)
        if dead or not resolved:
            groups = sorted({site.group for site in spec.sites})
            raise RankError(
                f"LoRA type {self.name}: {dead} match no site of {spec.architecture}; expected "
                f"'all', a group of {groups}, or a site such as {spec.sites[0].name!r}"
            )
        return resolved

    def _agreed(self, keys: Sequence[str], site: Site) -> int:
        if len({self.ranks[key] for key in keys}) > 1:
            raise RankError(
                f"LoRA type {self.name}: {keys} give {site.name} different ranks, and none is more "
                "specific; name the site in full"
            )
        return self._checked(keys[0], site)

    def _checked(self, key: str, site: Site) -> int:
        rank, limit = self.ranks[key], min(site.shape)
        if not 1 <= rank <= limit:
            raise RankError(
                f"LoRA type {self.name}: rank {rank} ({key}) at {site.name}, a {site.m}×{site.n} "
                f"matrix, is outside 1…{limit}; give a smaller rank, or 'scaled' types for a "
                "narrow model"
            )
        return rank


def _specificity(key: str, site: Site) -> int:
    """0 if the key does not name the site, else larger for more specific keys."""
    if key == site.name:
        return 4
    if key == site.name.rsplit(".", 1)[-1] or fnmatch.fnmatchcase(site.name, key):
        return 3
    if key == site.group:
        return 2
    return int(key == "all")


def _family(*ranks: tuple[int, int]) -> dict[str, LoRAType]:
    """T1, T2, … from pairs (attention, feed-forward)."""
    return {
        f"T{i}": LoRAType(f"T{i}", {"attention": attention, "feed-forward": feed_forward})
        for i, (attention, feed_forward) in enumerate(ranks, start=1)
    }


TYPES: Mapping[str, Mapping[str, LoRAType]] = {
    "paper": _family((8, 8), (30, 30), (30, 200), (200, 200)),
    "scaled": _family((1, 1), (4, 4), (4, 24), (24, 24)),
}
"""Families of types by name. ``paper`` is FlexLoRA's (arXiv 2402.11505) [P]; ``scaled`` is ours,
the same shape for models a few hundred wide [D]."""

DISTRIBUTIONS: Mapping[str, Mapping[str, float]] = {
    "uniform": {"T1": 0.25, "T2": 0.25, "T3": 0.25, "T4": 0.25},
    "heavy-tail-light": {"T1": 0.85, "T2": 0.05, "T3": 0.05, "T4": 0.05},
    "heavy-tail-strong": {"T1": 0.05, "T2": 0.05, "T3": 0.05, "T4": 0.85},
    "normal": {"T1": 0.06, "T2": 0.44, "T3": 0.44, "T4": 0.06},
}
"""Shares of T1…T4 by name, FlexLoRA's resource distributions. [P] for the heavy share of each;
[I] for how the rest is shared (the released code says 80 where its README says 85) and for which
types dominate in ``normal``."""


@dataclass(frozen=True)
class Fleet:
    """The clients of a run, each with its LoRA type."""

    types: Mapping[str, LoRAType]
    assigned: Mapping[str, str]

    def __post_init__(self) -> None:
        _known(self.assigned.values(), self.types)
        if "all" in self.types:
            raise RankError("Fleet: 'all' means every client in reports; name the type otherwise")
        if not self.assigned:
            raise RankError("Fleet: expected at least one client, got none")

    @staticmethod
    def sample(
        clients: Iterable[str],
        distribution: str | Mapping[str, float],
        *,
        types: str | Mapping[str, LoRAType] = "paper",
        seed: int = 0,
    ) -> Fleet:
        """Return a fleet with these shares of types, dealt to the clients at random.

        `distribution` is a name of `DISTRIBUTIONS` or shares per type that sum to one. Counts are
        the shares rounded by largest remainder, so that they are met as nearly as whole clients
        allow; only who gets which type is random.
        """
        family = _named(TYPES, types, "a family of LoRA types")
        shares = _named(DISTRIBUTIONS, distribution, "a resource distribution")
        _known(shares, family)
        ids = sorted(clients)
        counts = _counts(shares, len(ids))
        names = [name for name in sorted(counts) for _ in range(counts[name])]
        random.Random(seed).shuffle(names)
        return Fleet(family, dict(zip(ids, names, strict=True)))

    @staticmethod
    def table(
        clients: Mapping[str, str], *, types: str | Mapping[str, LoRAType] = "paper"
    ) -> Fleet:
        """Return a fleet from an explicit table client -> type."""
        return Fleet(_named(TYPES, types, "a family of LoRA types"), dict(clients))

    def forced(self, name: str, spec: ModelSpec) -> Fleet:
        """Return the homogeneous control: every client of one type.

        `name` is a type, or ``weakest``: of the types that clients of this fleet have, the one that
        trains the fewest parameters (ties by name).
        """
        if name == "weakest":
            present = sorted(set(self.assigned.values()))
            name = min(present, key=lambda t: (_parameters(self.types[t], spec), t))
        return Fleet(self.types, dict.fromkeys(self.assigned, name))

    def ranks(self, spec: ModelSpec) -> dict[str, dict[str, int]]:
        """Return the rank per client and site; clients of one type share one dict."""
        by_type = {
            name: self.types[name].resolve(spec) for name in sorted(set(self.assigned.values()))
        }
        return {client: by_type[name] for client, name in self.assigned.items()}

    def counts(self) -> dict[str, int]:
        """Return how many clients each type has, types without clients left out."""
        return dict(sorted(Counter(self.assigned.values()).items()))


def _known(names: Iterable[str], types: Mapping[str, LoRAType]) -> None:
    unknown = sorted(set(names) - set(types))
    if unknown:
        raise RankError(f"Fleet: no LoRA type {unknown}; there are {sorted(types)}")


def _named(table: Mapping[str, T], value: str | T, what: str) -> T:
    if not isinstance(value, str):
        return value
    if value not in table:
        raise RankError(f"Fleet: {value!r} is not {what}; there are {sorted(table)}")
    return table[value]


def _counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Round shares of `total` to whole numbers that sum to it, by largest remainder."""
    whole = sum(shares.values())
    if not (all(share >= 0 for share in shares.values()) and abs(whole - 1) <= 1e-6):
        raise RankError(f"Fleet: shares must be at least 0 and sum to 1, got {dict(shares)}")
    due = {name: share / whole * total for name, share in shares.items()}
    counts = {name: int(exact + 1e-9) for name, exact in due.items()}
    rest = sorted(shares, key=lambda name: (counts[name] - due[name], name))
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _parameters(kind: LoRAType, spec: ModelSpec) -> int:
    ranks = kind.resolve(spec)
    return sum(ranks[s.name] * (s.m + s.n) for s in spec.sites if s.name in ranks)
