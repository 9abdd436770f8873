"""Ranks from the spectra of an aggregate: keep the most energy per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polyrank.errors import RankError


def spectrum(
    sigma: Mapping[str, Sequence[float]],
    unit: Mapping[str, int],
    budget: int,
    floor: int = 0,
    limit: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return ranks that keep much of an aggregate's energy Σ_s Σ_{j<r_s} σ_{s,j}² [D].

    `sigma` are each site's singular values, falling; `unit` the bytes of one rank there, in
    proportion to m + n; Σ_s unit_s·r_s ≤ `budget`. Directions are taken by energy per byte,
    σ_{s,j}²/unit_s, the largest first, ties by the order of the sites; one that no longer fits is
    passed over, for cheaper ones may. Directions without energy are not taken.

    The first `floor` ranks of each site, up to its `limit` (min(m, n); without it as many as its
    singular values, or the floor), come before all others and also where σ is zero or not given,
    so that directions which the aggregate has not seen can still grow. Where the budget does not
    reach for all floors, they are filled rank by rank, the sites with most energy per byte first.

    The energy kept is the largest possible at every budget that this order fills exactly, and
    otherwise less than it by at most the energy of one direction: the first that did not fit.
    Both hold among the ranks that respect the floors, where the budget affords these.

    Ranks by σ²/cost were found independently by FedHera (ICML 2026).

    Raises RankError for a negative budget or floor, a unit below 1, and singular values that rise,
    are negative or not finite, naming the site.
    """
    if budget < 0 or floor < 0:
        raise RankError(
            f"spectrum: expected a budget and a floor of at least 0, got {budget} and {floor}"
        )
    steps: list[tuple[int, float, int, str]] = []
    for order, (site, values) in enumerate(sigma.items()):
        _check(site, values, unit)
        most = max(len(values), floor) if limit is None else limit[site]
        for j in range(most):
            value = values[j] if j < len(values) else 0.0
            if j < floor or value > 0:
                early = j if j < floor else floor
                steps.append((early, -value * value / unit[site], order, site))
    steps.sort(key=lambda step: step[:3])
    ranks = dict.fromkeys(sigma, 0)
    full: set[str] = set()
    left = budget
    for _, _, _, site in steps:
        if site in full:
            continue
        if unit[site] > left:
            full.add(site)
            continue
        ranks[site] += 1
        left -= unit[site]
    return ranks


def _check(site: str, values: Sequence[float], unit: Mapping[str, int]) -> None:
    if unit[site] < 1:
        raise RankError(f"spectrum: expected at least 1 byte a rank at {site}, got {unit[site]}")
    before = math.inf
    for value in values:
        if not (math.isfinite(value) and 0 <= value <= before):
            raise RankError(
                f"spectrum: expected singular values at {site} that fall, finite and not negative; "
                f"got {value!r}" + ("" if before == math.inf else f" after {before!r}")
            )
        before = value
