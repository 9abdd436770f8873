"""Aggregation weights: how much each client's update counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from polyrank.errors import RuleError


def normalised(weights: Mapping[str, float] | Iterable[float]) -> list[float]:
    """Return w_i / Σ w in the given order; the result sums to one up to rounding.

    A mapping (client -> weight, such as its number of examples) lets a message name the client.
    Raises RuleError for no weights, a negative or non-finite one, or a sum of zero.
    """
    named = (
        {f"client {client!r}": weight for client, weight in weights.items()}
        if isinstance(weights, Mapping)
        else {f"weight {index}": weight for index, weight in enumerate(weights)}
    )
    for name, weight in named.items():
        if not math.isfinite(weight) or weight < 0:
            raise RuleError(f"aggregation: {name} has weight {weight}; expected a finite one ≥ 0")
    if not any(named.values()):
        raise RuleError(
            f"aggregation: expected at least one positive weight, got {len(named)} that are all "
            "zero; a round needs an update of a client with training examples"
        )
    largest = max(named.values())
    relative = [weight / largest for weight in named.values()]
    total = math.fsum(relative)
    return [weight / total for weight in relative]


def capped(weights: Mapping[str, float], most: float | None) -> dict[str, float]:
    """Return weights of which none is more than the share `most` of their sum.

    Who has more is set to w_i = `most`·Σ w, and what is taken off is shared among the others in
    proportion to their weights, again and again until it holds: the one solution with
    w_i = min(most, λ·w_i) and Σ w_i = 1. If the clients of positive weight are too few for it,
    `most`·k ≤ 1 for k of them, they weigh equally; a weight of zero stays zero. Where no share
    exceeds `most`, or it is None, the weights are returned as given, otherwise as shares.

    Raises RuleError unless 0 < most ≤ 1, and as `normalised` does.
    """
    if most is None:
        return dict(weights)
    if not 0 < most <= 1:
        raise RuleError(f"aggregation: expected a largest share in (0, 1], got {most}")
    rounding = most * (1 + 1e-12)  # Shares that were capped and summed again are not above it.
    if max(normalised(weights)) <= rounding:
        return dict(weights)
    rest = {client: weight for client, weight in weights.items() if weight > 0}
    if most * len(rest) <= 1:
        return {client: 1 / len(rest) if client in rest else 0.0 for client in weights}
    at_cap: dict[str, float] = {}
    while True:  # Each that reaches the cap makes the others heavier.
        room = 1 - most * len(at_cap)
        scaled = {c: room * s for c, s in zip(rest, normalised(rest), strict=True)}
        over = [client for client, share in scaled.items() if share > rounding]
        if len(over) in (0, len(rest)):  # All of them only by rounding.
            return {client: (at_cap | scaled).get(client, 0.0) for client in weights}
        at_cap |= dict.fromkeys(over, most)
        rest = {client: weight for client, weight in rest.items() if client not in at_cap}
