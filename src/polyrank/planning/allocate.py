"""Ranks for a client's sites, so that the important ones get most of its bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyrank.errors import RankError
from polyrank.lazy_torch import torch
from polyrank.planning.importance import tied
from polyrank.planning.local_search import ROUNDING, SiteChoices, repair, worth
from polyrank.planning.rank_choices import checked_rank_choices


def allocate(
    gain: Mapping[str, float],
    unit: Mapping[str, int],
    budget: int,
    choices: Sequence[int],
    limit: Mapping[str, int],
) -> dict[str, int]:
    """Return ranks r_s that make Σ_s gain_s·r_s large with Σ_s unit_s·r_s ≤ `budget`.

    `gain` is each site's importance *before* any division by cost (dividing here too would count
    the cost twice [D]), `unit` the bytes of one rank there, `choices` the ranks Q that may be given
    beside 0, `limit` the largest rank of each site, min(m, n). A site without importance, or whose
    limit is below the smallest choice, gets 0.

    HSplitLoRA's problem (arXiv 2505.02795 [S]), solved so [I]: sites by gain per byte, each at its
    largest choice that still fits; then single swaps, lowering one site and raising another (or
    raising one alone), the best each time, until none helps. Where that stays away from what could
    be reached at most, the same with one of the most valuable sites served first. Where all sites
    cost the same, a table makes it exact.

    What is promised, OPT being the largest value possible [D, tested against brute force]:

    - value ≥ (1 − TIE)·(OPT − item), the item being the largest gain_s times a step between
      neighbouring choices of that site (0 counts as a choice): one step of one site. The same holds
      with OPT of the relaxed problem, where ranks need not be among the choices.
    - value ≥ (1 − TIE)·OPT where all sites cost the same, and where the budget affords all.
    - The same ranks for the same arguments; gains within `importance.TIE` of each other are ties
      and count as equal, and of equal sites the earlier ones get the larger ranks.

    On random cases the value is far nearer to OPT than promised; docs/reference/devices.md has
    the figures.

    Raises RankError for a negative budget, a unit below 1, and a gain that is negative or not
    finite, naming the site; RecipeError for choices that `checked_rank_choices` refuses.
    """
    sites = _sites(gain, unit, checked_rank_choices(choices), limit)
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
"""The number of sites that are tried at their largest affordable choice before all others."""


def _sites(
    gain: Mapping[str, float],
    unit: Mapping[str, int],
    choices: tuple[int, ...],
    limit: Mapping[str, int],
) -> list[SiteChoices]:
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
    largest = max(gain.values(), default=0.0) or 1.0  # Relative to it, rounding has no scale.
    return [
        SiteChoices(
            name,
            value / largest,
            unit[name],
            (0, *choices[: bisect_right(choices, limit[name])]),
        )
        for name, value in tied(gain).items()
        if value > 0 and limit[name] >= choices[0]
    ]


@dataclass(frozen=True)
class _Relaxed:
    """The best value where ranks need not be among the choices, and the price of a byte there.

    Sites with more gain per byte than the price are at their top, those with less at 0.
    """

    value: float
    price: float


def _relaxed(sites: Sequence[SiteChoices], order: Sequence[int], budget: int) -> _Relaxed:
    value = 0.0
    for i in order:
        site = sites[i]
        affordable = budget / site.unit
        if affordable < site.choices[-1]:
            return _Relaxed(value + site.gain * affordable, site.gain / site.unit)
        value += site.gain * site.choices[-1]
        budget -= site.unit * site.choices[-1]
    return _Relaxed(value, 0.0)


def _filled(sites: Sequence[SiteChoices], order: Sequence[int], budget: int) -> list[int]:
    """Return every site, in that order, at its largest choice that still fits."""
    ranks = [0] * len(sites)
    for i in order:
        site = sites[i]
        ranks[i] = _largest(site, budget)
        budget -= ranks[i] * site.unit
    return ranks


def _largest(site: SiteChoices, budget: int) -> int:
    return site.choices[bisect_right(site.choices, budget // site.unit) - 1]


def _forced(
    sites: Sequence[SiteChoices], order: Sequence[int], ranks: list[int], budget: int
) -> list[int]:
    """The best of these ranks and of new ones that serve one of the most valuable sites first.

    Where one step takes much of the budget, filling by gain per byte may spend on small sites
    what a large one needed, and no single swap undoes several of them.
    """
    single = {i: sites[i].gain * _largest(sites[i], budget) for i in order}
    best, most = ranks, worth(sites, ranks)
    for first in sorted(order, key=lambda i: -single[i])[:_STARTS]:
        if ranks[first] * sites[first].gain < single[first]:
            tried = _filled(sites, [first, *(i for i in order if i != first)], budget)
            repair(sites, tried, budget)
            value = worth(sites, tried)
            if value > most * (1 + ROUNDING):
                best, most = tried, value
    return best


def _exact(
    sites: Sequence[SiteChoices], ranks: list[int], affordable: int, relaxed: _Relaxed
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
        step = site.choices[-1] - site.choices[-2] if wants_all else site.choices[1]
        if abs(site.gain - price) * step >= gap * (1 + ROUNDING):
            settled[i] = site.choices[-1] if wants_all else 0
    open_sites = [i for i in range(len(sites)) if i not in settled]
    table = _table([sites[i] for i in open_sites], affordable - sum(settled.values()))
    combined = [settled.get(i, 0) for i in range(len(sites))]
    for i, rank in zip(open_sites, table, strict=True):
        combined[i] = rank
    better = worth(sites, combined) > worth(sites, ranks) * (1 + ROUNDING)
    return combined if better else ranks


def _table(sites: Sequence[SiteChoices], affordable: int) -> list[int]:
    """The best ranks that sum to at most `affordable`, by dynamic programming.

    best[c] after a site: the most value of the sites so far with at most c ranks in all.
    """
    spent = min(affordable, sum(site.choices[-1] for site in sites))
    best = torch.zeros(spent + 1, dtype=torch.float64)
    chosen = torch.zeros(len(sites), spent + 1, dtype=torch.int32)
    for s, site in enumerate(sites):
        before = best.clone()
        for level in site.choices[1:]:
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


def _order(sites: Sequence[SiteChoices], ranks: list[int]) -> None:
    """Give equal sites their ranks from the largest down, in order, in place."""
    equal: dict[SiteChoices, list[int]] = {}
    for i, site in enumerate(sites):
        equal.setdefault(SiteChoices("", site.gain, site.unit, site.choices), []).append(i)
    for members in equal.values():
        falling = sorted((ranks[i] for i in members), reverse=True)
        for i, rank in zip(members, falling, strict=True):
            ranks[i] = rank
