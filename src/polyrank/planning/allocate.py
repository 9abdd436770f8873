"""Ranks for a client's sites, so that the important ones get most of its bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyrank.errors import RankError
from polyrank.lazy_torch import torch
from polyrank.planning.importance import tied
from polyrank.planning.levels import checked_levels
from polyrank.planning.local_search import ROUNDING, Site, repair, worth


def allocate(
    gain: Mapping[str, float],
    unit: Mapping[str, int],
    budget: int,
    levels: Sequence[int],
    limit: Mapping[str, int],
) -> dict[str, int]:
    """Return ranks r_s that make Σ_s gain_s·r_s large with Σ_s unit_s·r_s ≤ `budget`.

    `gain` is each site's importance *before* any division by cost (dividing here too would count
    the cost twice [D]), `unit` the bytes of one rank there, `levels` the ranks Q that may be given
    beside 0, `limit` the largest rank of each site, min(m, n). A site without importance, or whose
    limit is below the smallest level, gets 0.

    HSplitLoRA's problem (arXiv 2505.02795 [S]), solved so [I]: sites by gain per byte, each at its
    largest level that still fits; then single swaps, lowering one site and raising another (or
    raising one alone), the best each time, until none helps. Where that stays away from what could
    be reached at most, the same with one of the most valuable sites served first. Where all sites
    cost the same, a table makes it exact.

    What is promised, OPT being the largest value possible [D, tested against brute force]:

    - value ≥ (1 − TIE)·(OPT − item), the item being the largest gain_s times a step between
      neighbouring levels of that site (0 counts as a level): one level of one site. The same holds
      with OPT of the relaxed problem, where ranks need not be levels.
    - value ≥ (1 − TIE)·OPT where all sites cost the same, and where the budget affords all.
    - The same ranks for the same arguments; gains within `importance.TIE` of each other are ties
      and count as equal, and of equal sites the earlier ones get the larger ranks.

    On random cases the value is far nearer to OPT than promised; docs/reference/devices.md has
    the figures.

    Raises RankError for a negative budget, a unit below 1, and a gain that is negative or not
    finite, naming the site; RecipeError for levels that `checked_levels` refuses.
    """
    sites = _sites(gain, unit, checked_levels(levels), limit)
    if budget < 0:
        raise RankError(f"allocate: expected a budget of at least 0 bytes, got {budget}")
    order = sorted(range(len(sites)), key=lambda i: (-sites[i].gain / sites[i].unit, i))
    ranks = _filled(sites, order, budget)
    repair(sites, ranks, budget)
    relaxed = _relaxed(sites, order, budget)
    if worth(sites, ranks) < relaxed.value * (1 - _NEAR):
        ranks = _forced(sites, order, ranks, budget)
    if len({site.unit for site in sites}) == 1:
        ranks = _exact(sites, ranks, budget // sites[0].unit, relaxed)
    _order(sites, ranks)
    return dict.fromkeys(gain, 0) | {
        site.name: rank for site, rank in zip(sites, ranks, strict=True)
    }


_NEAR = 1e-3
"""Nearer to the relaxed problem's optimum than this, relative to it, no more starts are tried."""

_STARTS = 8
"""How many sites are tried at their largest affordable level before all others."""


def _sites(
    gain: Mapping[str, float],
    unit: Mapping[str, int],
    levels: tuple[int, ...],
    limit: Mapping[str, int],
) -> list[Site]:
    for name, value in gain.items():
        if not (math.isfinite(value) and value >= 0):
            raise RankError(
                f"allocate: expected a gain at {name} that is finite and not negative, got "
                f"{value!r}"
            )
        if unit[name] < 1:
            raise RankError(
                f"allocate: expected at least 1 byte a rank at {name}, got {unit[name]}"
            )
    return [
        Site(name, value, unit[name], (0, *levels[: bisect_right(levels, limit[name])]))
        for name, value in tied(gain).items()
        if value > 0 and limit[name] >= levels[0]
    ]


@dataclass(frozen=True)
class _Relaxed:
    """The best where ranks need not be levels: its value, and the price of a byte there.

    Sites with more gain per byte than the price are at their top, those with less at 0.
    """

    value: float
    price: float


def _relaxed(sites: Sequence[Site], order: Sequence[int], budget: int) -> _Relaxed:
    value = 0.0
    for i in order:
        site = sites[i]
        affordable = budget / site.unit
        if affordable < site.levels[-1]:
            return _Relaxed(value + site.gain * affordable, site.gain / site.unit)
        value += site.gain * site.levels[-1]
        budget -= site.unit * site.levels[-1]
    return _Relaxed(value, 0.0)


def _filled(sites: Sequence[Site], order: Sequence[int], budget: int) -> list[int]:
    """Every site, in that order, at its largest level that still fits."""
    ranks = [0] * len(sites)
    for i in order:
        site = sites[i]
        ranks[i] = _largest(site, budget)
        budget -= ranks[i] * site.unit
    return ranks


def _largest(site: Site, budget: int) -> int:
    return site.levels[bisect_right(site.levels, budget // site.unit) - 1]


def _forced(
    sites: Sequence[Site], order: Sequence[int], ranks: list[int], budget: int
) -> list[int]:
    """The best of these ranks and of new ones that serve one of the most valuable sites first.

    Where one level takes much of the budget, filling by gain per byte may spend on small sites
    what a large one needed, and no single swap undoes several of them.
    """
    single = {i: sites[i].gain * _largest(sites[i], budget) for i in order}
    best, most = ranks, worth(sites, ranks)
    for first in sorted(order, key=lambda i: -single[i])[:_STARTS]:
        if ranks[first] * sites[first].gain < single[first]:
            other = _filled(sites, [first, *(i for i in order if i != first)], budget)
            repair(sites, other, budget)
            found = worth(sites, other)
            if found > most * (1 + ROUNDING):
                best, most = other, found
    return best


def _exact(
    sites: Sequence[Site], ranks: list[int], affordable: int, relaxed: _Relaxed
) -> list[int]:
    """The best ranks where all sites cost the same, so that `affordable` ranks are shared out.

    Against the relaxed optimum a site loses |gain − price| for each rank that it is off its own
    choice there. Ranks better than the given ones lose less than these do: a site whose smallest
    step would lose as much keeps its choice, and a table decides about the others.
    """
    price = relaxed.price * sites[0].unit
    gap = relaxed.value - worth(sites, ranks)
    if gap <= ROUNDING * relaxed.value:
        return ranks
    settled: dict[int, int] = {}
    for i, site in enumerate(sites):
        wants_all = site.gain > price
        step = site.levels[-1] - site.levels[-2] if wants_all else site.levels[1]
        if abs(site.gain - price) * step >= gap * (1 + ROUNDING):
            settled[i] = site.levels[-1] if wants_all else 0
    open_sites = [i for i in range(len(sites)) if i not in settled]
    found = _table([sites[i] for i in open_sites], affordable - sum(settled.values()))
    other = [settled.get(i, 0) for i in range(len(sites))]
    for i, rank in zip(open_sites, found, strict=True):
        other[i] = rank
    better = worth(sites, other) > worth(sites, ranks) * (1 + ROUNDING)
    return other if better else ranks


def _table(sites: Sequence[Site], affordable: int) -> list[int]:
    """The best ranks that sum to at most `affordable`, by dynamic programming.

    best[c] after a site: the most value of the sites so far with at most c ranks in all.
    """
    spent = min(affordable, sum(site.levels[-1] for site in sites))
    best = torch.zeros(spent + 1, dtype=torch.float64)
    chosen = torch.zeros(len(sites), spent + 1, dtype=torch.int32)
    for s, site in enumerate(sites):
        before = best.clone()
        for level in site.levels[1:]:
            if level > spent:
                break
            candidate = before[: spent + 1 - level] + site.gain * level
            chosen[s, level:].masked_fill_(candidate > best[level:], level)
            torch.maximum(best[level:], candidate, out=best[level:])
    ranks = [0] * len(sites)
    left = spent
    for s in reversed(range(len(sites))):
        ranks[s] = int(chosen[s, left])
        left -= ranks[s]
    return ranks


def _order(sites: Sequence[Site], ranks: list[int]) -> None:
    """Give equal sites their ranks from the largest down, in order, in place."""
    equal: dict[Site, list[int]] = {}
    for i, site in enumerate(sites):
        equal.setdefault(Site("", site.gain, site.unit, site.levels), []).append(i)
    for members in equal.values():
        falling = sorted((ranks[i] for i in members), reverse=True)
        for i, rank in zip(members, falling, strict=True):
            ranks[i] = rank
