"""Ways to divide examples among clients. Each returns, per client, places in the given order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from polyrank.errors import DataError

ATTEMPTS = 11
"""How often `dirichlet` draws before it gives up on a smallest part, as in flwr-datasets."""


def by_value(places: Sequence[int], values: Sequence[int]) -> dict[int, list[int]]:
    """Return one part per value, with the places that have it; ``values[place]`` is a place's."""
    parts: dict[int, list[int]] = {}
    for place in places:
        parts.setdefault(values[place], []).append(place)
    return parts


def contiguous(places: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Return `parts` slices in order; their sizes differ by one at most, larger ones first."""
    size, larger = divmod(len(places), parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return [places[start:end] for start, end in itertools.pairwise(starts)]


def dirichlet(
    places: Sequence[int],
    values: Sequence[int],
    parts: int,
    *,
    alpha: float,
    smallest: int,
    seed: int,
) -> list[list[int]]:
    """Return `parts` parts; each value's share among them is drawn from Dirichlet(`alpha`).

    All is drawn anew while a part has fewer than `smallest` places. Source: Yurochkin et al.
    (arXiv 1905.12022), without its balancing; for a seed the parts are those of flwr-datasets'
    ``DirichletPartitioner(shuffle=False)``. Raises DataError after `ATTEMPTS` draws.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    of_value = sorted(by_value(places, values).items())
    for _ in range(ATTEMPTS):
        drawn: list[list[int]] = [[] for _ in range(parts)]
        for _, own in of_value:
            shares = rng.dirichlet(np.full(parts, alpha))
            ends = (np.cumsum(shares) * len(own)).astype(int)[:-1].tolist()
            for part, start, end in zip(drawn, [0, *ends], [*ends, len(own)], strict=True):
                part += own[start:end]
        if min(map(len, drawn)) >= smallest:
            return drawn
    raise DataError(
        f"partition by dirichlet: {ATTEMPTS} draws of {len(places)} examples for {parts} clients "
        f"all left a client with fewer than {smallest}; take fewer clients, a larger alpha or a "
        "smaller min_examples"
    )
