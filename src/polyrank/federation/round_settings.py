"""What all rounds of a run share: rule, ranks, weights, cuts and bounds on updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from polyrank.aggregation import Rule
from polyrank.planning import Scaling, Split

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
    cut_of: Callable[[str, int], Split | None] | None = None
    held_by: Mapping[Split, frozenset[str]] = field(default_factory=dict)
    sites: frozenset[str] | None = None

    def cut(self, client: str, round: int) -> Split | None:
        """Return where this client's model is cut in this round; None if it runs all of it."""
        return None if self.cut_of is None else self.cut_of(client, round)

    def held(self, client: str, round: int) -> frozenset[str] | None:
        """Return the sites that a split client holds itself in this round; None: all of them."""
        cut = self.cut(client, round)
        return None if cut is None else self.held_by[cut]

    def affordable(self, client: str, round: int) -> Ranks:
        """Return the ranks that this client can afford in this round."""
        return (self.ranks if self.ranks_in is None else self.ranks_in(round))[client]
