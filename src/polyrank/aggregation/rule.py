"""The interface of rules, and an assignment made by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from polyrank.aggregation.choose import choose
from polyrank.aggregation.types import (
    TRAINED,
    Assignment,
    Contribution,
    FleetSpec,
    Penalty,
    SiteAssignment,
    SiteReport,
    State,
)
from polyrank.algebra import Adapter, Delta, Dense, Factorisation, LowRank
from polyrank.errors import RuleError


class Rule(ABC):
    """How updates become the next state, and the state becomes assignments. Pure.

    A round asks, in this order: `merged` once; `ranks`, `personal` and `assign_site` (or
    `assign_own`) for every client; `weigh` once; `merge_site` for every site; `conclude` once.
    Rules are frozen dataclasses whose fields are their options.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name used in recipes and reports, e.g. ``flexlora:delta``."""

    @property
    def mixed_ranks(self) -> bool:
        """Whether clients may differ in rank at a site."""
        return True

    @property
    def excludes(self) -> Mapping[str, str]:
        """What makes no sense with the rule, each with the reason.

        Keys are local methods by name, and ``shared``: one adapter behind the cut for all split
        clients, who must then be sent the same there and return the same.
        """
        return {}

    @abstractmethod
    def init(self, spec: FleetSpec) -> State:
        """Return the state before the first round; RuleError if this fleet cannot be served."""

    @abstractmethod
    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return what a client of this rank and scale gets at one site; deterministic in `seed`."""

    @abstractmethod
    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with this site aggregated. Weights sum to one; read in order, once."""

    @abstractmethod
    def adapter(self, state: State) -> Adapter[Delta]:
        """Return the global adapter.

        `LowRank` factors are at the server's rank and ordered by singular value; what a rule keeps
        as an exact sum is `Dense`.
        """

    def ranks(self, state: State, client: str, ranks: Mapping[str, int]) -> Mapping[str, int]:
        """Return the ranks to assign to a client that can afford `ranks`: those, unless pruned."""
        return ranks

    def personal(self, state: State, client: str) -> bool:
        """Whether this client is sent factors of its own, not those of all clients of its rank."""
        return False

    def assign_own(
        self,
        state: State,
        client: str,
        site: str,
        rank: int,
        scale: float,
        seed: int,
    ) -> SiteAssignment:
        """Return what a `personal` client gets at one site: as `assign_site` unless it has more."""
        return self.assign_site(state, site, rank, scale, seed)

    def weigh(
        self,
        state: State,
        weights: Mapping[str, float],
        norm: Callable[[str], float],
    ) -> Mapping[str, float]:
        """Return the clients' weights in a round, not yet normalised: those given, unless own.

        `norm` gives ‖ΔW‖_F of a client's update over all its sites; each call reads the update.
        """
        return weights

    def conclude(self, state: State, clients: Sequence[str]) -> State:
        """Return the state at the end of a round, all sites merged; `clients` were accepted."""
        return state

    def merged(self, state: State) -> Adapter[Dense]:
        """Return what is added to the base of every client, whichever sites it trains."""
        return Adapter({})

    def catch_up(
        self,
        state: State,
        client: str,
        sites: Collection[str] | None = None,
    ) -> int:
        """Return the bytes of `merged` that this client has yet to download; 0 without merging.

        `sites` names those that it holds, as a client with a cut holds some; None: all.
        """
        return 0

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:
        """Return per site the largest rank of a frozen term that a client may come to hold."""
        return {}

    def growth(self, spec: FleetSpec) -> int:
        """Return by how many bytes the state may come to grow, about, once all took part."""
        return 0

    def elsewhere(self, state: State, sites: Collection[str]) -> Adapter[LowRank]:
        """Return what is active, and not trained, at the sites other than these for their client.

        A client that trains nothing at a site is sent nothing there, unless the rule says so here.
        """
        return Adapter({})

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state that begins at these updates instead of at zero (SLoRA's start).

        Raises RuleError if the rule cannot begin anywhere but at zero.
        """
        raise RuleError(f"{self.name}: it cannot start from a given update")


def assign(
    rule: Rule,
    state: State,
    ranks: Mapping[str, int],
    scale: Mapping[str, float],
    seed: int,
    *,
    client: str | None = None,
    merged: Adapter[Dense] | None = None,
) -> Assignment:
    """Return the assignment of a client with these ranks and scales per site.

    `client` names one that is `personal`; None: any of these ranks. `merged`, if given, is what the
    rule said of it already, so that assignments share it. Raises RuleError if sites are to be
    trained in different ways.
    """
    sites: dict[str, SiteAssignment] = {}
    for s in sorted(ranks):
        asked = (s, ranks[s], scale[s], seed)
        sites[s] = (
            rule.assign_site(state, *asked)
            if client is None
            else rule.assign_own(state, client, *asked)
        )
    ways = {site_assignment.train for site_assignment in sites.values()} or {"both"}
    if len(ways) > 1:
        raise RuleError(f"{rule.name}: expected one way of training at all sites, got {ways}")
    train = ways.pop()
    choose(f"way of training in {rule.name}", train, TRAINED)
    return Assignment(
        start=Adapter({site: site_assignment.start for site, site_assignment in sites.items()}),
        scale={site: scale[site] for site in sorted(ranks)},
        frozen=Adapter(
            {
                s: site_assignment.frozen
                for s, site_assignment in sites.items()
                if site_assignment.frozen is not None
            }
            | dict(rule.elsewhere(state, ranks))
        ),
        merged=rule.merged(state) if merged is None else merged,
        train=train,
        penalty=_penalty(sites),
    )


def _penalty(sites: Mapping[str, SiteAssignment]) -> Penalty | None:
    terms = {name: site.penalty for name, site in sites.items() if site.penalty is not None}
    strengths = {strength for strength, _ in terms.values()}
    if len(strengths) > 1:
        raise RuleError(f"expected one strength of the penalty at all sites, got {strengths}")
    keep = {site: keep for site, (_, keep) in terms.items()}
    return Penalty(strengths.pop(), keep) if strengths else None
