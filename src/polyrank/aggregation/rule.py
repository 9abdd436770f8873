"""What a rule is: how updates become the next state, and the state becomes assignments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from polyrank.aggregation.choose import choose
from polyrank.aggregation.types import (
    TRAINED,
    Assignment,
    Contribution,
    Dealt,
    FleetSpec,
    Penalty,
    SiteReport,
    State,
)
from polyrank.algebra import Adapter, Delta, Dense, Factorisation, LowRank
from polyrank.errors import RuleError


class Rule(ABC):
    """How updates become the next state, and the state becomes assignments. Pure.

    A round asks, in this order: `merged` once; `ranks`, `personal` and `deal_site` (or `deal_own`)
    for every client; `weigh` once; `merge_site` for every site; `conclude` once. Rules are frozen
    dataclasses whose fields are their options.
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
        clients, who must then be dealt the same there and return the same.
        """
        return {}

    @abstractmethod
    def init(self, spec: FleetSpec) -> State:
        """Return the state before the first round; RuleError if this fleet cannot be served."""

    @abstractmethod
    def deal_site(self, state: State, site: str, rank: int, scale: float, seed: int) -> Dealt:
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

    def ranks(self, state: State, client: str, ranks: Mapping[str, int]) -> Mapping[str, int]:  # noqa: ARG002
        """Return the ranks to deal to a client that can afford `ranks`: those, unless pruned."""
        return ranks

    def personal(self, state: State, client: str) -> bool:  # noqa: ARG002
        """Whether this client is dealt factors of its own, not those of all clients of its rank."""
        return False

    def deal_own(
        self,
        state: State,
        client: str,  # noqa: ARG002
        site: str,
        rank: int,
        scale: float,
        seed: int,
    ) -> Dealt:
        """Return what a `personal` client gets at one site: as `deal_site`, unless it has more."""
        return self.deal_site(state, site, rank, scale, seed)

    def weigh(
        self,
        state: State,  # noqa: ARG002
        weights: Mapping[str, float],
        norm: Callable[[str], float],  # noqa: ARG002
    ) -> Mapping[str, float]:
        """Return the clients' weights in a round, not yet normalised: those given, unless own.

        `norm` gives ‖ΔW‖_F of a client's update over all its sites; each call reads the update.
        """
        return weights

    def conclude(self, state: State, clients: Sequence[str]) -> State:  # noqa: ARG002
        """Return the state at the end of a round, all sites merged; `clients` were accepted."""
        return state

    def merged(self, state: State) -> Adapter[Dense]:  # noqa: ARG002
        """Return what is added to the base of every client, whichever sites it trains."""
        return Adapter({})

    def catch_up(
        self,
        state: State,  # noqa: ARG002
        client: str,  # noqa: ARG002
        sites: Collection[str] | None = None,  # noqa: ARG002
    ) -> int:
        """Return the bytes of `merged` that this client has yet to download; 0 without merging.

        `sites` names those that it holds, as a client with a cut holds some; None: all.
        """
        return 0

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:  # noqa: ARG002
        """Return per site the largest rank of a frozen term that a client may come to hold."""
        return {}

    def growth(self, spec: FleetSpec) -> int:  # noqa: ARG002
        """Return by how many bytes the state may come to grow, about, once all took part."""
        return 0

    def elsewhere(self, state: State, sites: Collection[str]) -> Adapter[LowRank]:  # noqa: ARG002
        """Return what is active, and not trained, at the sites other than these for their client.

        A client that trains nothing at a site is dealt nothing there, unless the rule says so here.
        """
        return Adapter({})

    def started(self, state: State, found: Mapping[str, Factorisation]) -> State:  # noqa: ARG002
        """Return the state that begins at these updates instead of at zero (SLoRA's start).

        Raises RuleError if the rule cannot begin anywhere but at zero.
        """
        raise RuleError(f"{self.name}: it cannot start from a given update")


def deal(
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
    dealt: dict[str, Dealt] = {}
    for s in sorted(ranks):
        asked = (s, ranks[s], scale[s], seed)
        dealt[s] = (
            rule.deal_site(state, *asked)
            if client is None
            else rule.deal_own(state, client, *asked)
        )
    ways = {one.train for one in dealt.values()} or {"both"}
    if len(ways) > 1:
        raise RuleError(f"{rule.name}: expected one way of training at all sites, got {ways}")
    train = ways.pop()
    choose(f"way of training in {rule.name}", train, TRAINED)
    return Assignment(
        start=Adapter({site: one.start for site, one in dealt.items()}),
        scale={site: scale[site] for site in sorted(ranks)},
        frozen=Adapter(
            {s: one.frozen for s, one in dealt.items() if one.frozen is not None}
            | dict(rule.elsewhere(state, ranks))
        ),
        merged=rule.merged(state) if merged is None else merged,
        train=train,
        penalty=_penalty(dealt),
    )


def _penalty(dealt: Mapping[str, Dealt]) -> Penalty | None:
    found = {site: one.penalty for site, one in dealt.items() if one.penalty is not None}
    strengths = {strength for strength, _ in found.values()}
    if len(strengths) > 1:
        raise RuleError(f"expected one strength of the penalty at all sites, got {strengths}")
    keep = {site: keep for site, (_, keep) in found.items()}
    return Penalty(strengths.pop(), keep) if strengths else None
