"""Fleets: which LoRA ranks every client trains at."""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from polyrank.errors import ModelError, RankError
from polyrank.planning.cut import CutPoint
from polyrank.planning.schedule import Schedule
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

    Raises RankError for a rank below 1.
    """

    name: str
    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        for key, rank in self.ranks.items():
            if rank < 1:
                raise RankError(
                    f"LoRA type {self.name}: rank {rank} ({key}) is below 1; give a larger one, or "
                    "leave the key out"
                )

    def resolve(self, spec: ModelSpec) -> dict[str, int]:
        """Return the rank per site.

        Raises RankError for a rank above the matrix, a key that matches no site, keys that
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
        if rank > limit:
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

DISTRIBUTIONS: Mapping[str, Callable[[int], list[float]]] = {
    "uniform": lambda types: [1 / types] * types,
    "heavy-tail-light": lambda types: [*_shared(0.85, 1), *_shared(0.15, types - 1)],
    "heavy-tail-strong": lambda types: [*_shared(0.15, types - 1), *_shared(0.85, 1)],
    "normal": lambda types: [0.06, *_shared(0.88, types - 2), 0.06] if types > 2 else [1.0] * types,
}
"""The shares of so many types, the weakest first, by name: FlexLoRA's resource distributions.
[P] for four types and the heavy share of each; [I] for how the rest is shared (the released code
says 80 where its README says 85), for which types dominate in ``normal``, and for other numbers of
types. Shares that do not sum to 1, as with few types, are read in proportion."""


def _shared(share: float, types: int) -> list[float]:
    """Share it equally; rounded, so that 0.15 among three is 0.05 and not its neighbour."""
    return [round(share / types, 12)] * types if types > 0 else []


@dataclass(frozen=True)
class Fleet:
    """The clients of a run, each with its LoRA type.

    `assigned` are the types of the first round; with a `schedule` they change from round to round.
    `cuts` says, by type, which blocks a client runs itself; types that it does not name run the
    whole model. Raises RankError for a type or a client of the schedule, or a type of the cuts,
    that is not in the fleet.
    """

    types: Mapping[str, LoRAType]
    assigned: Mapping[str, str]
    schedule: Schedule | None = None
    cuts: Mapping[str, CutPoint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _known(self.assigned.values(), self.types)
        _known(self.cuts, self.types, "cuts: ")
        if self.schedule is not None:
            _known(self.schedule.types, self.types)
            unknown = sorted(self.schedule.clients - set(self.assigned))
            if unknown:
                near = difflib.get_close_matches(unknown[0], self.assigned, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RankError(f"fleet schedule: there are no clients {unknown[:5]}{hint}")
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
        cuts: Mapping[str, CutPoint] | None = None,
    ) -> Fleet:
        """Return a fleet with these shares of types, given to the clients at random.

        `distribution` is a name of `DISTRIBUTIONS` or shares per type that sum to one. Counts are
        the shares rounded by largest remainder, so that they are met as nearly as whole clients
        allow; only who gets which type is random. With a name, a type may be left without a client
        where there are few. Raises RankError for shares that do not sum to one, and for a share
        that is given to a type and comes to no client at all.
        """
        family, shares = shares_of(distribution, types)
        ids = sorted(clients)
        counts = _counts(shares, len(ids))
        if not isinstance(distribution, str):
            _refuse_empty(shares, counts, len(ids))
        names = [name for name in sorted(counts) for _ in range(counts[name])]
        random.Random(seed).shuffle(names)
        return Fleet(family, dict(zip(ids, names, strict=True)), cuts=dict(cuts or {}))

    @staticmethod
    def table(
        clients: Mapping[str, str],
        *,
        types: str | Mapping[str, LoRAType] = "paper",
        cuts: Mapping[str, CutPoint] | None = None,
    ) -> Fleet:
        """Return a fleet from an explicit table client -> type."""
        family = _named(TYPES, types, "a family of LoRA types")
        return Fleet(family, dict(clients), cuts=dict(cuts or {}))

    def with_schedule(self, schedule: Schedule | None) -> Fleet:
        """Return the same fleet with types that change as the schedule says."""
        return replace(self, schedule=schedule)

    def at(self, round: int) -> Mapping[str, str]:
        """Return client -> type in a round (from 1)."""
        return self.assigned if self.schedule is None else self.schedule.at(self.assigned, round)

    def cut_of(self, client: str, round: int) -> CutPoint | None:
        """Return where this client's model is cut in a round; None if it runs all of it."""
        return self.cuts.get(self.at(round)[client])

    def check_cuts(self, spec: ModelSpec) -> None:
        """Raise ModelError for a cut that is not within the model."""
        for name, cut in sorted(self.cuts.items()):
            try:
                cut.at_client(spec.blocks)
            except ModelError as error:
                raise ModelError(f"fleet.cuts.{name}: {error}") from error

    @property
    def possible(self) -> list[str]:
        """The types that some client has in some round, by name."""
        later = set() if self.schedule is None else self.schedule.types
        return sorted(set(self.assigned.values()) | later)

    def forced(self, name: str, spec: ModelSpec) -> Fleet:
        """Return the homogeneous control: every client of one type, and its cut, in every round.

        `name` is a type, or ``weakest``: of the types that clients of this fleet have, the one that
        trains the fewest parameters (ties by name).
        """
        if name == "weakest":
            name = self._by_parameters(spec)[0]
        return Fleet(self.types, dict.fromkeys(self.assigned, name), cuts=self.cuts)

    def strongest(self, spec: ModelSpec) -> str:
        """Return the type that trains the most parameters, of those that clients have."""
        return self._by_parameters(spec)[-1]

    def _by_parameters(self, spec: ModelSpec) -> list[str]:
        """The types that clients have, those with the fewest parameters first, ties by name."""
        return sorted(self.possible, key=lambda t: (_parameters(self.types[t], spec), t))

    def ranks(self, spec: ModelSpec) -> dict[str, dict[str, int]]:
        """Return the rank per client and site in round 1; clients of one type share one dict."""
        by_type = self.ranks_by_type(spec)
        return {client: by_type[name] for client, name in self.at(1).items()}

    def ranks_by_type(self, spec: ModelSpec) -> dict[str, dict[str, int]]:
        """Return the rank per site of every type that a client may have."""
        return {name: self.types[name].resolve(spec) for name in self.possible}

    def counts(self) -> dict[str, int]:
        """Return how many clients each type has in round 1, types without clients left out."""
        return dict(sorted(Counter(self.at(1).values()).items()))


def shares_of(
    distribution: str | Mapping[str, float], types: str | Mapping[str, LoRAType] = "paper"
) -> tuple[Mapping[str, LoRAType], Mapping[str, float]]:
    """Return the types and the share of each; RankError if a name or the shares cannot be."""
    family = _named(TYPES, types, "a family of LoRA types")
    if not family:
        raise RankError(
            "Fleet: expected at least one LoRA type, got none; give types a name and ranks"
        )
    if isinstance(distribution, str):
        shares = _named(DISTRIBUTIONS, distribution, "a resource distribution")(len(family))
        whole = sum(shares)
        return family, dict(zip(_by_rank(family), (s / whole for s in shares), strict=True))
    _known(distribution, family)
    shares_given = distribution.values()
    if not (all(share >= 0 for share in shares_given) and abs(sum(shares_given) - 1) <= 1e-6):
        raise RankError(f"Fleet: shares must be at least 0 and sum to 1, got {dict(distribution)}")
    return family, distribution


def _by_rank(family: Mapping[str, LoRAType]) -> list[str]:
    """The types, the weakest first: T1 to T4 as they are called, others by their ranks.

    By the largest rank, then by the mean of those that are given; ties by name.
    """
    if set(family) == set(TYPES["paper"]):
        return sorted(family)
    ranks = {name: [*kind.ranks.values()] for name, kind in family.items()}
    return sorted(family, key=lambda t: (max(ranks[t]), sum(ranks[t]) / len(ranks[t]), t))


def _known(names: Iterable[str], types: Mapping[str, LoRAType], place: str = "") -> None:
    unknown = sorted(set(names) - set(types))
    if unknown:
        raise RankError(f"Fleet: {place}no LoRA type {unknown}; there are {sorted(types)}")


def _named(table: Mapping[str, T], value: str | T, what: str) -> T:
    if not isinstance(value, str):
        return value
    if value not in table:
        raise RankError(f"Fleet: {value!r} is not {what}; there are {sorted(table)}")
    return table[value]


def _counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Round shares of `total` to whole numbers that sum to it, by largest remainder."""
    whole = sum(shares.values())
    due = {name: share / whole * total for name, share in shares.items()}
    counts = {name: int(exact + 1e-9) for name, exact in due.items()}
    rest = sorted(shares, key=lambda name: (counts[name] - due[name], name))
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _refuse_empty(shares: Mapping[str, float], counts: Mapping[str, int], total: int) -> None:
    """Raise RankError for a type that was to have clients and gets none."""
    empty = sorted(name for name, share in shares.items() if share > 0 and not counts[name])
    if total and empty:
        name = empty[0]
        raise RankError(
            f"Fleet: {shares[name]:.2%} of {total} clients leave no client for type {name}"
            f"{f' (nor for {empty[1:]})' if empty[1:] else ''}; take more clients, give the type a "
            "larger share, or leave it out of the shares"
        )


def _parameters(kind: LoRAType, spec: ModelSpec) -> int:
    ranks = kind.resolve(spec)
    return sum(ranks[s.name] * (s.m + s.n) for s in spec.sites if s.name in ranks)
