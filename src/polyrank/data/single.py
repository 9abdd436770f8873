"""One client from tasks that are all its own."""

from __future__ import annotations

from collections.abc import Sequence

from polyrank.data.clients import Clients
from polyrank.data.partition import trim
from polyrank.data.sequences import select
from polyrank.data.split import check_fractions, split
from polyrank.data.table import Table
from polyrank.data.types import ClientData, Skipped, Tasks

CATEGORY = "category"
"""The column of a client's category, where all its examples agree."""


def single(
    tasks: Tasks,
    id: str,
    *,
    category: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    limit: int | None = None,
    seed: int = 0,
) -> Clients:
    """Return one client that has all the tasks, split as `partition` splits a client of that name.

    The parts depend on `seed`, `id` and the examples alone, so they are those that the client has
    where its examples lie in one source with others' and a column names it. Which examples a
    `limit` keeps depends on their row numbers too, which differ between the two. `category` left
    out is the value of the column ``category``, where all examples agree.

    Raises RecipeError for fractions that cannot be.
    """
    shares = check_fractions(fractions)
    table = Table.of(tasks, {CATEGORY})
    skipped = [tasks.skipped]
    places = range(len(tasks.examples))
    chosen = trim({id: places}, tasks, table, limit, 1, seed, skipped)[id]
    parts = split(select(tasks.examples, chosen), shares, seed, id)
    named = table.common(CATEGORY, chosen) if category is None else category
    return Clients([ClientData(id, *parts, category=named)], Skipped.of(skipped))
