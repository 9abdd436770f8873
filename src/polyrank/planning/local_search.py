"""Local search by single swaps: one site lowered, another raised, as long as that gains."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROUNDING = 1e-12
"""Relative gains below this are rounding of sums: counting them, a search might not end."""


@dataclass(frozen=True)
class SiteChoices:
    """A site that can get a rank: its gain (ties made equal), bytes per rank, choices from 0."""

    name: str
    gain: float
    unit: int
    choices: tuple[int, ...]


def worth(sites: Sequence[SiteChoices], ranks: Sequence[int]) -> float:
    """Return Σ gain·rank."""
    return sum(site.gain * rank for site, rank in zip(sites, ranks, strict=True))


def repair(sites: Sequence[SiteChoices], ranks: list[int], budget: int) -> None:
    """Make the best single swap, in place, until none gains.

    Sites of one cost, one set of levels and one present rank differ in their gain alone: the least
    important of them is the one to lower, the most important the one to raise. So a swap is looked
    for among kinds of sites, of which a model has few.
    """
    left = budget - sum(rank * site.unit for rank, site in zip(ranks, sites, strict=True))
    while True:
        raises = _Raises(sites, ranks)
        best, swap = 0.0, None
        for loss, freed, lowered, to in [(0.0, 0, -1, 0), *_lowerings(sites, ranks)]:
            raised_by = raises.best(left + freed, lowered)
            if raised_by is not None and raised_by[0] - loss > best:
                best, swap = raised_by[0] - loss, (lowered, to, *raised_by[1:])
        if swap is None or best <= ROUNDING * worth(sites, ranks):
            return
        lowered, to, raised, rank_to = swap
        for i, rank in ((lowered, to), (raised, rank_to)):
            if i >= 0:
                left -= (rank - ranks[i]) * sites[i].unit
                ranks[i] = rank


def _kinds(sites: Sequence[SiteChoices], ranks: Sequence[int]) -> Iterator[list[int]]:
    """Sites that differ in their gain alone, the largest gain first, ties in order."""
    kinds: dict[tuple[int, int, int], list[int]] = {}
    for i, site in enumerate(sites):
        kinds.setdefault((site.unit, len(site.choices), ranks[i]), []).append(i)
    for members in kinds.values():
        members.sort(key=lambda i: -sites[i].gain)
        yield members


def _lowerings(
    sites: Sequence[SiteChoices], ranks: Sequence[int]
) -> Iterator[tuple[float, int, int, int]]:
    """(gain lost, bytes freed, site, its new level) of the cheapest lowerings."""
    for members in _kinds(sites, ranks):
        last = members[-1]
        for level in sites[last].choices:
            if level >= ranks[last]:
                break
            down = ranks[last] - level
            yield sites[last].gain * down, sites[last].unit * down, last, level


class _Raises:
    """The best raising of one site for any number of bytes."""

    def __init__(self, sites: Sequence[SiteChoices], ranks: Sequence[int]) -> None:
        options: list[tuple[int, float, int, int]] = []
        for members in _kinds(sites, ranks):
            for i in members[:2]:  # the second in case the first is the one that is lowered
                for level in sites[i].choices:
                    up = level - ranks[i]
                    if up > 0:
                        options.append((sites[i].unit * up, sites[i].gain * up, i, level))
        options.sort(key=lambda option: (option[0], -option[1], option[2]))
        self._costs = [option[0] for option in options]
        self._best: list[tuple[tuple[float, int, int] | None, tuple[float, int, int] | None]] = []
        first: tuple[float, int, int] | None = None
        second: tuple[float, int, int] | None = None  # the best of another site than the first's
        for _, gained, i, level in options:
            option = (gained, i, level)
            if first is None or gained > first[0]:
                if first is not None and first[1] != i:
                    second = first
                first = option
            elif first[1] != i and (second is None or gained > second[0]):
                second = option
            self._best.append((first, second))

    def best(self, budget: int, but: int) -> tuple[float, int, int] | None:
        """(gain, site, its new level) of the best raising within so many bytes, of another site."""
        at = bisect_right(self._costs, budget)
        if at == 0:
            return None
        first, second = self._best[at - 1]
        return first if first is None or first[1] != but else second
