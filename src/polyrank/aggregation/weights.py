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
