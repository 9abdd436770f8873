"""Ways to share out a client's bytes among sites: evenly, by importance, or by spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from polyrank.planning.allocate import allocate
from polyrank.planning.importance import Scores
from polyrank.planning.spectrum import spectrum

Worth = tuple[float, float]
"""What plans are compared by, the larger the better; the second where the first are equal."""


class Sharing(Protocol):
    """A way to share bytes out, and what the ranks are worth that come of it."""

    def ranks(
        self,
        units: Mapping[str, int],
        budget: int,
        choices: Sequence[int],
        limit: Mapping[str, int],
    ) -> dict[str, int]:
        """Return ranks r with Σ units·r ≤ budget, none above its limit; 0 for none."""
        ...

    def worth(self, ranks: Mapping[str, int]) -> Worth:
        """Return what these ranks are worth; it does not depend on their order."""
        ...


@dataclass(frozen=True)
class Even:
    """Nothing is known of the sites: as many as possible, then as evenly as possible."""

    def ranks(  # noqa: D102
        self,
        units: Mapping[str, int],
        budget: int,
        choices: Sequence[int],
        limit: Mapping[str, int],
    ) -> dict[str, int]:
        return even(units, budget, choices, limit)

    def worth(self, ranks: Mapping[str, int]) -> Worth:
        """Return how many sites are trained; then Σ rank."""
        return float(len(ranks)), float(sum(ranks.values()))


@dataclass(frozen=True)
class ByImportance:
    """HSplitLoRA's: Σ gain·rank, by `allocate`; a site without a gain has the least of those given.

    arXiv 2505.02795 [S].
    """

    gains: Scores

    @cached_property
    def _least(self) -> float:
        return min(self.gains.values(), default=1.0)

    def _gain(self, site: str) -> float:
        return self.gains.get(site, self._least)

    def ranks(  # noqa: D102
        self,
        units: Mapping[str, int],
        budget: int,
        choices: Sequence[int],
        limit: Mapping[str, int],
    ) -> dict[str, int]:
        return allocate({s: self._gain(s) for s in units}, units, budget, choices, limit)

    def worth(self, ranks: Mapping[str, int]) -> Worth:
        """Return Σ gain·rank."""
        return math.fsum(self._gain(site) * rank for site, rank in ranks.items()), 0.0


def even(
    units: Mapping[str, int], budget: int, choices: Sequence[int], limit: Mapping[str, int]
) -> dict[str, int]:
    """Return ranks that spread bytes over sites of which nothing is known.

    All sites are brought to the first choice, in order, then to the next, as far as the bytes go.
    """
    ranks = dict.fromkeys(units, 0)
    for level in choices:
        for site, unit in units.items():
            more = unit * (level - ranks[site])
            if level <= limit[site] and more <= budget:
                ranks[site], budget = level, budget - more
    return ranks


@dataclass(frozen=True)
class BySpectrum:
    """The energy of the aggregate that is kept, by `spectrum`, with a floor.

    `sigma` are the singular values that the aggregate has at each site, falling.
    """

    sigma: Mapping[str, Sequence[float]]

    def ranks(
        self,
        units: Mapping[str, int],
        budget: int,
        choices: Sequence[int],
        limit: Mapping[str, int],
    ) -> dict[str, int]:
        """Return ranks, also between the choices: from the smallest, if it fits, to the largest."""
        top = {site: min(choices[-1], most) for site, most in limit.items()}
        given = {site: list(self.sigma.get(site, ()))[: top[site]] for site in units}
        return spectrum(given, units, budget, choices[0], top)

    def worth(self, ranks: Mapping[str, int]) -> Worth:
        """Return Σ σ² over the directions kept; then Σ rank."""
        energies = (value**2 for s, rank in ranks.items() for value in self.sigma.get(s, ())[:rank])
        return math.fsum(energies), float(sum(ranks.values()))
