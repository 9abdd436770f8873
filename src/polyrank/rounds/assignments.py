"""What a round deals to its clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from polyrank.aggregation import Assignment, Rule, State
from polyrank.aggregation import deal as deal_all
from polyrank.algebra import Adapter, Delta, Dense
from polyrank.planning import CutPoint, Scaling
from polyrank.seeds import derive

D = TypeVar("D", bound=Delta)

_Key = tuple[str | None, tuple[tuple[str, int], ...]]
"""Whose assignment: one client's own, or that of all clients with these ranks."""


@dataclass
class RoundAssignments:
    """Deals one round's assignments from a rule's state, each made and hashed once."""

    settings: RoundSettings
    state: State
    number: int
    _dealt: dict[_Key, tuple[Assignment, str]] = field(default_factory=dict)
    _by_client: dict[str, tuple[Assignment, str]] = field(default_factory=dict)
    _nbytes: dict[str, int] = field(default_factory=dict)

    def of(self, client: str) -> tuple[Assignment, str]:
        """Return the client's assignment and its hash, made once for all of equal ranks.

        A client that the rule keeps factors for has an assignment of its own.
        """
        if client not in self._by_client:
            rule, afforded = self.settings.rule, self.settings.affordable(client, self.number)
            ranks = rule.ranks(self.state, client, afforded)
            own = client if rule.personal(self.state, client) else None
            key = own, tuple(sorted(ranks.items()))
            if key not in self._dealt:
                scale = {site: self.settings.scaling.scale(rank) for site, rank in ranks.items()}
                seed = derive(self.settings.seed, self.number, "deal")
                assignment = deal_all(
                    rule, self.state, ranks, scale, seed, client=own, merged=self._merged
                )
                self._dealt[key] = assignment, assignment.hash()
            self._by_client[client] = self._dealt[key]
        return self._by_client[client]

    @cached_property
    def _merged(self) -> Adapter[Dense]:
        """What is merged into the base of all clients; one object, so that it is hashed once."""
        return self.settings.rule.merged(self.state)

    def nbytes(self, client: str) -> int:
        """Return the bytes of the tensors dealt to a client, at the sites that it holds."""
        if client not in self._nbytes:
            self._nbytes[client] = self._count(client)
        return self._nbytes[client]

    def _count(self, client: str) -> int:
        assignment, held = self.of(client)[0], self.settings.held(client, self.number)
        missed = self.settings.rule.catch_up(self.state, client, held)
        if held is None:
            return assignment.nbytes + missed
        own = replace(
            assignment, start=within(assignment.start, held), frozen=within(assignment.frozen, held)
        )
        return own.nbytes + missed


def within(adapter: Adapter[D], sites: Collection[str]) -> Adapter[D]:
    """Return what an adapter has at some sites; it need not have all of them."""
    return adapter.restrict(site for site in adapter if site in sites)


Ranks = Mapping[str, int]
"""Rank per site."""


@dataclass(frozen=True)
class RoundSettings:
    """What stays the same from round to round.

    `ranks` per client and site in the first round, and `ranks_in` those of any round, where they
    change; `weights` per client, not yet normalised, of which none counts more than the share
    `max_share`; `scaling` of LoRA; `max_increment`: an update whose ‖ΔW − what was dealt‖_F over
    all sites is larger is refused, `clip_increment`: shortened to it. `cut_of` gives a client's cut
    in a round, and `held_by` the sites that the client holds at each cut that may come, of those
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
    held_by: Mapping[CutPoint, frozenset[str]] = field(default_factory=dict)
    sites: frozenset[str] | None = None

    def cut(self, client: str, round: int) -> CutPoint | None:
        """Return where this client's model is cut in this round; None if it runs all of it."""
        return None if self.cut_of is None else self.cut_of(client, round)

    def held(self, client: str, round: int) -> frozenset[str] | None:
        """Return the sites that a split client holds itself in this round; None: all of them."""
        cut = self.cut(client, round)
        return None if cut is None else self.held_by[cut]

    def affordable(self, client: str, round: int) -> Ranks:
        """Return the ranks that this client can afford in this round."""
        return (self.ranks if self.ranks_in is None else self.ranks_in(round))[client]
