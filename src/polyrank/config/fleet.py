"""The section of a recipe that says which client is what: types, ranks, cuts, and their changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from polyrank.config.trace import read_trace
from polyrank.errors import ModelError, RecipeError
from polyrank.planning import CutPoint, Fleet, LoRAType, Redraw, Schedule, Trace, shares_of
from polyrank.settings import Expected, check

Types = Annotated[
    str | dict[str, int | dict[str, int]],
    Expected("a family's name or a table, e.g. {T1 = 4, T2 = {attention = 4, feed-forward = 8}}"),
]
Distribution = Annotated[
    str | dict[str, float] | None,
    Expected("a name or a table of shares, e.g. {T1 = 0.9, T2 = 0.1}"),
]
Cuts = Annotated[
    dict[str, int | list[int]] | None,
    Expected("a table of blocks by type, e.g. {T1 = 2, T2 = [2, 6]}"),
]
Changes = Annotated[
    dict[str, dict[str, str]] | None,
    Expected('changes of type by round, e.g. {5 = {alice = "T1"}}'),
]


@dataclass(frozen=True)
class FleetSection:
    """Which LoRA ranks every client has: give `distribution` or `clients`.

    Neither where ranks are planned for clients that bring their own data and devices.
    """

    types: Types = "paper"
    """A family by name, or a table of types: one rank, or ranks by `all`, group (`attention`,
    `feed-forward`) or site. `paper`: T1 8, T2 30, T3 30 in attention and 200 in feed-forward,
    T4 200. `scaled`, for narrow models: T1 1, T2 4, T3 4 and 24, T4 24."""
    distribution: Distribution = None
    """How many clients have which type: `uniform`, `heavy-tail-light` (85% the weakest type),
    `heavy-tail-strong` (85% the strongest), `normal` (88% the ones between), each for any types and
    any number of clients; or shares that sum to 1."""
    clients: dict[str, str] | None = None
    """The type of every training client, by name."""
    force: str | None = None
    """Give every client this type, or the `weakest` of the fleet: the homogeneous control."""
    redraw: Annotated[int, Ge(1)] | None = None
    """Give the same types to the clients anew, at random, every so many rounds."""
    trace: str | None = None
    """A CSV or JSON-lines file with columns `round`, `client` and `type`: from that round on (they
    count from 1) the client has that type; client `*` is everyone not named beside it. It is kept
    in the run folder's recipe as `schedule`."""
    schedule: Changes = None
    """The same in the recipe: `{5 = {alice = "T1"}, 9 = {"*" = "T4"}}`."""
    cuts: Cuts = None
    """Split training: how many blocks clients of a type run themselves, from the first on, while
    the server runs the rest; `[2, 6]`: the first 2, and those from block 6 on (counted from 0) with
    labels and loss, a U-shape. Types that are not named run the whole model."""

    def __post_init__(self) -> None:
        check(self, "fleet")

    def of_devices(self) -> FleetSection:
        """Return the same section with devices as types, their ranks not yet planned.

        Raises RecipeError if it gives types or cuts of its own, or a name in the place of shares.
        """
        given = [key for key in ("types", "cuts") if getattr(self, key) not in (None, "paper")]
        if given:
            raise RecipeError(
                f"fleet.{given[0]}: with [plan], ranks and cuts are planned; leave it out"
            )
        if isinstance(self.distribution, str):
            raise RecipeError(
                "fleet.distribution: with [plan], expected a table of shares per device, e.g. "
                f"{{phone = 0.8, laptop = 0.2}}, got {self.distribution!r}"
            )
        return replace(self, types=dict.fromkeys(self.device_names, 1))

    @property
    def names_none(self) -> bool:
        """Whether it says of no client what type it has."""
        return self.distribution is None and self.clients is None

    @property
    def device_names(self) -> list[str]:
        """The devices that clients may have, where types are devices."""
        named = self.distribution if isinstance(self.distribution, dict) else {}
        schedule = self._schedule(seed=0)
        clients = set((self.clients or {}).values())
        return sorted({*named, *clients, *(schedule.types if schedule else ())})

    def build(self, clients: Iterable[str], seed: int) -> Fleet:
        """Return the fleet of these clients, not yet forced to one type."""
        return self._at_first(clients, seed).with_schedule(self._schedule(seed))

    def _at_first(self, clients: Iterable[str], seed: int) -> Fleet:
        types, cuts = self._types(), self._cuts()
        if self.clients is None:
            shares = self.distribution or {}
            return Fleet.sample(clients, shares, types=types, seed=seed, cuts=cuts)
        known = sorted(clients)
        unknown = sorted(set(self.clients) - set(known))
        if unknown:
            raise RecipeError(
                f"fleet.clients: {unknown[:5]} are no training clients of the data; there are "
                f"{known[:5]}{' and others' if len(known) > 5 else ''}"
            )
        return Fleet.table(self.clients, types=types, cuts=cuts)

    def _schedule(self, seed: int) -> Schedule | None:
        if self.redraw is not None:
            return Redraw(self.redraw, seed)
        if self.trace is not None:
            return Trace(read_trace(self.trace))
        return None if self.schedule is None else Trace(_by_round(self.schedule))

    def resolved(self) -> FleetSection:
        """Return the same section with what a trace file holds taken in."""
        if self.trace is None:
            return self
        changes = {str(round): named for round, named in read_trace(self.trace).items()}
        return replace(self, trace=None, schedule=changes)

    def check(self, forced: Mapping[str, str | None]) -> None:
        """Raise RecipeError or RankError for mistakes that show without clients and model.

        `forced` are the types, by key of the recipe, that all clients are to have.
        """
        if (self.distribution is None) == (self.clients is None):
            raise RecipeError(
                "fleet: give either distribution (a name or shares per type) or clients (a table "
                "client = type)"
            )
        changing = {"redraw": self.redraw, "trace": self.trace, "schedule": self.schedule}
        given = [name for name, value in changing.items() if value is not None]
        if len(given) > 1:
            raise RecipeError(f"fleet: {given} each say how types change; give one of them")
        if self.clients is None:
            types, _ = shares_of(self.distribution or {}, self._types())
        else:
            types = Fleet.table(self.clients, types=self._types()).types
        schedule = self._schedule(seed=0)
        unknown = sorted(schedule.types - set(types)) if schedule else []
        if unknown:
            raise RecipeError(f"fleet: the schedule gives {unknown}; there are {sorted(types)}")
        uncuttable = sorted(set(self._cuts()) - set(types))
        if uncuttable:
            raise RecipeError(f"fleet.cuts: no LoRA type {uncuttable}; there are {sorted(types)}")
        for key, name in forced.items():
            if name is not None and name not in ("weakest", *types):
                raise RecipeError(
                    f"{key}: expected weakest or one of {sorted(types)}, got {name!r}"
                )

    def _cuts(self) -> dict[str, CutPoint]:
        """Return the cuts by type; RecipeError for one that no model could have."""
        cuts = {}
        for name, written in (self.cuts or {}).items():
            try:
                cuts[name] = CutPoint.of(written)
            except ModelError as error:
                raise RecipeError(f"fleet.cuts.{name}: {error}") from error
        return cuts

    def _types(self) -> str | dict[str, LoRAType]:
        if isinstance(self.types, str):
            return self.types
        return {
            name: LoRAType(name, {"all": ranks} if isinstance(ranks, int) else ranks)
            for name, ranks in self.types.items()
        }


def _by_round(schedule: Mapping[str, Mapping[str, str]]) -> dict[int, Mapping[str, str]]:
    wrong = [key for key in schedule if not key.isdecimal()]
    if wrong:
        raise RecipeError(f"fleet.schedule: expected numbers of rounds as keys, got {wrong[0]!r}")
    return {int(key): named for key, named in schedule.items()}
