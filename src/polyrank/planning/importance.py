"""Importance of sites over time: smoothed, averaged over clients, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from polyrank.errors import UpdateError

Scores = Mapping[str, float]
"""Importance per site: not negative, finite."""

METRICS: Mapping[str, Callable[[Any], Any]] = {
    "channel": lambda sums: sums.abs().sum(),
    "paper": lambda sums: sums.sum().abs(),
}
"""The score of a site from c_k = Σ_tokens y_k ∂L/∂y_k, k = 1 … m.

``channel`` is Σ_k |c_k| [D]. ``paper`` is |Σ_k c_k| = |Σ_j w_j ∂L/∂w_j| (HSplitLoRA, arXiv
2505.02795 [S]), before its division by cost; it vanishes wherever a norm follows, for the loss does
not change then when the whole matrix grows.
"""

TIE = 1e-4
"""Scores that differ by less, relative to the larger, are taken as equal [D]."""


def smoothed(before: Scores | None, now: Scores, t: int, T: int) -> dict[str, float]:
    """Return Ī_t, the running importance after scores Ĩ_t = `now` of step or round `t` of `T`.

    Per site, with Ī_{t−1} = `before`,

        Ī_t = γ_t Ī_{t−1} + (1 − γ_t) Ĩ_t,    γ_t = 1 − exp(−(Ĩ_t · t) / (Ī_{t−1} · T))

    (HSplitLoRA, arXiv 2505.02795 [S]). γ is the share of the past. It grows with t, so that early
    scores, taken far from the solution, are soon replaced and late ones change little; and with
    Ĩ_t/Ī_{t−1}, so that a spike is damped while a low score is taken almost at once: a site that
    scores zero has γ = 0 and forgets its past. Ī_0 = Ĩ_1 [I]: without a past, the score itself.
    Where Ī_{t−1} = 0, γ would be 1 and hold the site at zero for ever: Ĩ_t is taken [D]. A site
    that `now` does not score keeps its value.

    Raises UpdateError, naming the site, for a score that is negative or not finite, and for t or T
    below 1.
    """
    if t < 1 or T < 1:
        raise UpdateError(f"importance: expected t and T of at least 1, got t = {t} and T = {T}")
    past = {} if before is None else {**before}
    _check(past, "the past importance")
    _check(now, "the new importance")
    updated = {site: _blended(past.get(site, 0.0), score, t / T) for site, score in now.items()}
    return {**past, **updated}


def averaged(by_client: Mapping[str, Scores], weights: Mapping[str, float]) -> dict[str, float]:
    """Return each site's mean over the clients that scored it, Σ w_i Ĩ_i / Σ w_i.

    Clients score what they host, so that the sums of the weights differ between sites; a site that
    only clients of weight zero scored is left out. Sites come in the order of first mention.

    Raises UpdateError for a client without a weight or with a weight that is negative or not
    finite, and for a score that is, naming client and site.
    """
    totals: dict[str, float] = {}
    mass: dict[str, float] = {}
    for client, scores in by_client.items():
        weight = weights.get(client)
        if weight is None or not (math.isfinite(weight) and weight >= 0):
            raise UpdateError(
                f"importance: expected a weight that is finite and not negative for client "
                f"{client}, got {weight!r}"
            )
        _check(scores, f"the importance from client {client}")
        for site, score in scores.items():
            totals[site] = totals.get(site, 0.0) + weight * score
            mass[site] = mass.get(site, 0.0) + weight
    return {site: total / mass[site] for site, total in totals.items() if mass[site]}


def moved(planned: Scores, now: Scores) -> float:
    """Return how far importance has moved since it was planned with, in [0, 1].

    The total variation distance ½ Σ_s |p_s − q_s| of the two, each divided by its sum: the share
    of all importance that now lies at other sites. Scaling all scores by one factor, as a falling
    loss does, is no movement. A site that one side does not score counts as zero there. Nothing
    and nothing are at distance 0, nothing and something at 1.

    Raises UpdateError, naming the site, for a score that is negative or not finite.
    """
    _check(planned, "the importance planned with")
    _check(now, "the importance now")
    p, q = _normalised(planned), _normalised(now)
    if not p or not q:
        return float(bool(p) != bool(q))
    sites = [*p, *(site for site in q if site not in p)]
    distance = math.fsum(abs(p.get(site, 0.0) - q.get(site, 0.0)) for site in sites) / 2
    return min(1.0, distance)


def tied(scores: Scores) -> dict[str, float]:
    """Return the scores with ties made equal: each group takes its largest score.

    From the largest down, a score joins the group above it if it is within `TIE` of the group's
    largest, relative to that; so no score grows by more than a factor 1/(1 − TIE), and rounding
    noise decides nothing that the order of the sites can decide.
    """
    made: dict[str, float] = {}
    leader = math.inf
    for site in sorted(scores, key=lambda site: -scores[site]):
        if scores[site] < leader * (1 - TIE):
            leader = scores[site]
        made[site] = leader
    return {site: made[site] for site in scores}


def _blended(past: float, score: float, elapsed: float) -> float:
    if past == 0.0:
        return score
    old = -math.expm1(-(score / past) * elapsed)
    return old * past + (1 - old) * score


def _normalised(scores: Scores) -> dict[str, float]:
    """Shares of the sum, divided by the largest first: no overflow; empty where nothing is."""
    top = max(scores.values(), default=0.0)
    if top == 0.0:
        return {}
    total = math.fsum(score / top for score in scores.values())
    return {site: score / top / total for site, score in scores.items()}


def _check(scores: Scores, whose: str) -> None:
    for site, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise UpdateError(
                f"{whose} at {site}: expected a finite number, not negative; got {score!r}. Look "
                "for a loss that overflowed: a lower learning rate or float32 may help"
            )
