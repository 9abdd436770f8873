"""The clients that take part in a round, and the subset that is evaluated."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from polyrank.seeds import derive
from polyrank.training.client_data import ClientWork, Part


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


def evaluation_subset(
    work: Mapping[str, ClientWork], part: Part, types: Mapping[str, str], most: int, seed: int
) -> dict[str, ClientWork]:
    """Return up to `most` training and `most` held-out clients; all of them for 0.

    They are drawn from the clients with an example in this part; the same seed always draws the
    same ones, since the order is that of a hash of seed and client. Of the training clients each
    LoRA type (`types`) gives its share, and at least one client if there is room for that.
    """
    if not most:
        return dict(work)
    groups: dict[str, list[str]] = {}
    held_out: list[str] = []
    for id, client in work.items():
        if client.rows[part]:
            (groups.setdefault(types[id], []) if client.seen else held_out).append(id)

    def drawn(ids: list[str], count: int) -> list[str]:
        return sorted(ids, key=lambda id: derive(seed, id, "panel"))[:count]

    chosen = set(drawn(held_out, most))
    for name, count in _shares({name: len(ids) for name, ids in groups.items()}, most).items():
        chosen.update(drawn(groups[name], count))
    return {id: client for id, client in work.items() if id in chosen}


def _shares(sizes: Mapping[str, int], most: int) -> dict[str, int]:
    """Return how many to take of each group: one each, then always where most are lacking.

    Where `most` is below the number of groups, the largest get theirs.
    """
    total = sum(sizes.values())
    ordered = sorted(sizes, key=lambda name: (-sizes[name], name))
    taken = {name: int(place < most) for place, name in enumerate(ordered)}
    for _ in range(min(most, total) - sum(taken.values())):
        left = [name for name in ordered if taken[name] < sizes[name]]
        neediest = max(left, key=lambda name: most * sizes[name] / total - taken[name])
        taken[neediest] += 1
    return taken
