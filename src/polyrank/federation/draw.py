"""Who takes part in a round."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from polyrank.seeds import derive


def sample_clients(
    clients: Sequence[str], count: int, *seed: int | str, last: Collection[str] = ()
) -> list[str]:
    """Return `count` of the clients without replacement, sorted, from a seed of these parts.

    Clients named in `last` are taken only where the others do not suffice.
    """
    draw = random.Random(derive(*seed))
    first = sorted(set(clients) - set(last))
    chosen = draw.sample(first, min(count, len(first)))
    rest = sorted(set(clients) & set(last))
    return sorted(chosen + draw.sample(rest, min(count - len(chosen), len(rest))))
