"""Means, spreads and paired differences of scores. Pure; a value of None was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Paired:
    """The mean over clients of ours minus theirs, its standard error, and how many clients.

    `mean` is None if nothing can be paired, or if a client has no score on either side; `se` is
    None for fewer than two clients.
    """

    mean: float | None
    se: float | None
    clients: int


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there, or None if there are none."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def spread(values: Sequence[float | None]) -> float | None:
    """Return the sample standard deviation of the values that are there; None below two."""
    there = [value for value in values if value is not None]
    return stdev(there) if len(there) > 1 else None


def paired(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> Paired:
    """Return the paired difference d̄ = Σ (x_i − y_i)/n over the clients that both have.

    Its standard error is s_d/√n with s_d the sample standard deviation of the differences. A client
    whose score is None on one side only (a loss that is not finite, say) leaves no mean: one over
    the others would hide it. Clients without a score on both sides are passed over.
    """
    both = [(ours[id], theirs[id]) for id in sorted(ours.keys() & theirs.keys())]
    measured = [(x, y) for x, y in both if x is not None or y is not None]
    differences = [x - y for x, y in measured if x is not None and y is not None]
    if not differences or len(differences) < len(measured):
        return Paired(None, None, len(differences))
    deviation = spread(differences)
    se = None if deviation is None else deviation / math.sqrt(len(differences))
    return Paired(fmean(differences), se, len(differences))
