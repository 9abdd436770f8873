"""The assignments that a round sends to its clients, made by a rule from its state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from polyrank.aggregation import Assignment, Rule, State, assign
from polyrank.algebra import Adapter, Delta, Dense
from polyrank.planning import CutPoint, Scaling
from polyrank.seeds import derive

D = TypeVar("D", bound=Delta)

Ranks = Mapping[str, int]
"""Rank per site."""


@dataclass(frozen=True)
class RoundSettings:
    """What stays the same from round to round.

    `ranks` per client and site in the first round, and `ranks_in` those of any round, where they
    change; `weights` per client, not yet normalised, of which none counts more than the share
    `max_share`; `scaling` of LoRA; `max_increment`: an update whose ‖ΔW − start‖_F over all sites
    is larger is rejected, `clip_increment`: shortened to it. `cut_of` gives a client's cut in a
    round, and `sites_by_cut` the sites in the client's blocks for each cut that may come, of those
    that anyone trains; without them all clients run the whole model. `sites` are all of the
    model's, where a client may measure importance; None: those that it trains.
    """

    rule: Rule
    ranks: Mapping[str, Ranks]
    weights: Mapping[str, float]
    scaling: Scaling
    seed: int
    max_increment: float | None = None
    clip_increment: float | None = None
    max_share: float | None = None
    ranks_in: Callable[[int], Mapping[str, Ranks]] | None = None
    cut_of: Callable[[str, int], CutPoint | None] | None = None
    sites_by_cut: Mapping[CutPoint, frozenset[str]] = field(default_factory=dict)
    sites: frozenset[str] | None = None

    def cut(self, client: str, round: int) -> CutPoint | None:
        """Return where this client's model is cut in this round; None if it runs all of it."""
        return None if self.cut_of is None else self.cut_of(client, round)

    def sites_at(self, client: str, round: int) -> frozenset[str] | None:
        """Return the sites in a split client's own blocks in this round; None: all of them."""
        cut = self.cut(client, round)
        return None if cut is None else self.sites_by_cut[cut]

    def ranks_of(self, client: str, round: int) -> Ranks:
        """Return the ranks that this client can afford in this round."""
        return (self.ranks if self.ranks_in is None else self.ranks_in(round))[client]


@dataclass
class RoundAssignments:
    """One round's assignments, each made from the rule's state and hashed once."""

    settings: RoundSettings
    state: State
    number: int
    _made: dict[object, tuple[Assignment, str]] = field(default_factory=dict)
    _by_client: dict[str, tuple[Assignment, str]] = field(default_factory=dict)
    _nbytes: dict[str, int] = field(default_factory=dict)

    def of(self, client: str) -> tuple[Assignment, str]:
        """Return the client's assignment and its hash; clients of equal ranks share one object.

        A client that the rule keeps factors for has an assignment of its own.
        """
        if client not in self._by_client:
            rule = self.settings.rule
            ranks = rule.ranks(self.state, client, self.settings.ranks_of(client, self.number))
            own = client if rule.personal(self.state, client) else None
            key = own, tuple(sorted(ranks.items()))
            if key not in self._made:
                scale = {site: self.settings.scaling.scale(rank) for site, rank in ranks.items()}
                seed = derive(self.settings.seed, self.number, "deal")
                assignment = assign(
                    rule, self.state, ranks, scale, seed, client=own, merged=self._merged
                )
                self._made[key] = assignment, assignment.hash()
            self._by_client[client] = self._made[key]
        return self._by_client[client]

    @cached_property
    def _merged(self) -> Adapter[Dense]:
        """The sums merged into the base of all clients; one object, so that it is hashed once."""
        return self.settings.rule.merged(self.state)

    def nbytes(self, client: str) -> int:
        """Return the bytes of the tensors sent to a client, at the sites in its own blocks."""
        if client not in self._nbytes:
            assignment, sites = self.of(client)[0], self.settings.sites_at(client, self.number)
            missed = self.settings.rule.catch_up(self.state, client, sites)
            if sites is not None:
                assignment = replace(
                    assignment,
                    start=within(assignment.start, sites),
                    frozen=within(assignment.frozen, sites),
                )
            self._nbytes[client] = assignment.nbytes + missed
        return self._nbytes[client]


def within(adapter: Adapter[D], sites: Collection[str]) -> Adapter[D]:
    """Return the adapter at those of these sites that it has."""
    return adapter.restrict(site for site in adapter if site in sites)
