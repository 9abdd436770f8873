"""Clients from tasks: each client's examples, and the clients that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polyrank.data.clients import Clients
from polyrank.data.partitioners import by_value, contiguous, dirichlet
from polyrank.data.sequences import select
from polyrank.data.split import check_fractions, split
from polyrank.data.table import Table
from polyrank.data.types import ClientData, Skipped, Tasks
from polyrank.errors import DataError, RecipeError
from polyrank.seeds import derive

Groups = dict[str, Sequence[int]]
"""Of each client, the places of its examples among all."""
Unseen = str | Sequence[str] | int | float | None


@dataclass(frozen=True)
class Scheme:
    """The settings of a partition; see `partition`. `clients` is 0 where a column names them."""

    by: str
    clients: int
    alpha: float
    on: str
    seed: int
    min_examples: int


def partition(
    tasks: Tasks,
    *,
    by: str = "task",
    clients: int | None = None,
    alpha: float = 0.5,
    on: str = "category",
    unseen: Unseen = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    limit: int | None = None,
    min_examples: int = 1,
    seed: int = 0,
) -> Clients:
    """Return the tasks divided among clients, each split into training, validation and test.

    `by` names a column, each of whose values becomes a client (one task, one client); or it is
    ``iid`` (shuffled, equal), ``contiguous`` (equal, in the source's order) or ``dirichlet`` (the
    share of each value of column `on` among clients is drawn from Dirichlet(`alpha`); arXiv
    1905.12022), each with a number of `clients`; see `polyrank.data.partitioners`.

    `unseen` says who is held out entirely: a column of true and false, a list of client ids, a
    number of clients or a fraction of them (chosen by `seed`); left out, the column ``unseen`` if
    there is one; 0 for nobody. With ``iid``, ``contiguous`` and ``dirichlet``, rows that a column
    holds out form one client named ``unseen``.

    `limit` keeps so many examples per client, chosen by `seed`; clients with fewer than
    `min_examples` are left out. Rows that no client has are named in `skipped`. `on` is also the
    column of a client's category, where all its examples agree. A client's split depends on `seed`
    and its own examples alone.

    Raises DataError for a missing column, a client that is held out by halves, an unknown client or
    a partition that cannot be made; RecipeError for settings.
    """
    shares = check_fractions(fractions)
    _check(by, clients, alpha, limit, min_examples)
    scheme = Scheme(by, clients or 0, float(alpha), on, seed, min_examples)
    if isinstance(unseen, bool):
        raise RecipeError("unseen: expected a column, clients, a number or a fraction, got a bool")
    examples = tasks.examples
    table = Table.of(tasks, {by, on, unseen if isinstance(unseen, str) else "unseen"})
    if len(set(table.rows)) < len(table.rows):
        raise DataError(
            f"{tasks.source}: expected every example to have a row number of its own; number the "
            "examples of joined sources anew"
        )
    skipped = [tasks.skipped]
    places: Sequence[int] = range(len(examples))
    needed = {"dirichlet": on, "iid": None, "contiguous": None}.get(by, by)
    if needed is not None:
        values = table.column(needed, "to partition by")
        lacking = [f"row {table.rows[place]}" for place in places if values[place] < 0]
        if lacking:
            skipped.append(Skipped({f"no {needed}": lacking}))
            places = [place for place in places if values[place] >= 0]

    flagged = _flagged(table, places, unseen)
    if by in EVEN:
        seen_places = [place for place in places if place not in flagged]
        if scheme.clients > len(seen_places):
            raise DataError(
                f"{tasks.source}: {len(seen_places)} examples are too few for {clients} clients; "
                "lower clients"
            )
        groups = EVEN[by](scheme, table, seen_places)
        if flagged:
            groups["unseen"] = [place for place in places if place in flagged]
        held_out = {"unseen"} if flagged else set()
    else:
        groups = _natural(scheme, table, places)
        held_out = {id for id, group in groups.items() if group[0] in flagged}
        for id, group in groups.items():
            if flagged and len({place in flagged for place in group}) > 1:
                raise DataError(
                    f"{tasks.source}: client {id!r} is held out in some rows and not in others; a "
                    "client is held out entirely or takes part"
                )

    groups = trim(groups, tasks, table, limit, min_examples, seed, skipped)
    if not isinstance(unseen, str | None):
        held_out = _choose(unseen, sorted(groups), seed)
    return Clients(
        (
            ClientData(
                id,
                *split(select(examples, group), shares, seed, id),
                category=table.common(on, group),
                seen=id not in held_out,
            )
            for id, group in groups.items()
        ),
        Skipped.of(skipped),
    )


def _check(
    by: str, clients: int | None, alpha: float, limit: int | None, min_examples: int
) -> None:
    if by in EVEN:
        if clients is None or clients < 1:
            raise RecipeError(
                f"partition by {by}: expected a number of clients of at least 1, got {clients}"
            )
        if not 0 < alpha < float("inf"):
            raise RecipeError(f"partition: expected an alpha above 0, got {alpha}")
    elif clients is not None:
        raise RecipeError(
            f"partition by the column {by!r}: its values are the clients, so clients = "
            f"{clients} has no meaning; leave it out, or partition by {', '.join(EVEN)}"
        )
    for name, value in (("limit", limit), ("min_examples", min_examples)):
        if value is not None and value < 1:
            raise RecipeError(f"partition: expected {name} of at least 1, got {value}")


def _flagged(table: Table, places: Sequence[int], unseen: Unseen) -> set[int]:
    """Return the places that a column holds out; empty if no column decides."""
    if not isinstance(unseen, str | None):
        return set()
    column = unseen or "unseen"
    if unseen is None and column not in table.names:
        return set()
    codes = table.column(column, "to say who is held out")
    words = {"true": True, "1": True, "false": False, "0": False, "": False}
    told = [words.get(name.strip().lower()) for name in table.names[column]]
    told.append(False)  # For the code -1: an example without the column takes part.
    flagged = set()
    for place in places:
        held_out = told[codes[place]]
        if held_out is None:
            raise DataError(
                f"{table.source}, row {table.rows[place]}: expected true or false in column "
                f"{column!r}, which says who is held out, got "
                f"{table.names[column][codes[place]]!r}; correct it, or say otherwise with unseen "
                "(0 for nobody)"
            )
        if held_out:
            flagged.add(place)
    return flagged


def _choose(unseen: Sequence[str] | int | float, ids: Sequence[str], seed: int) -> set[str]:
    """Return the clients that a list names, or so many by the order of seeded hashes."""
    if not isinstance(unseen, int | float):
        unknown = sorted(set(unseen) - set(ids))
        if unknown:
            raise DataError(
                f"unseen: no client {unknown[0]!r}; the clients are {', '.join(ids[:10])}"
                f"{', …' if len(ids) > 10 else ''}"
            )
        return set(unseen)
    count = unseen if isinstance(unseen, int) else round(unseen * len(ids))
    if isinstance(unseen, float):
        if not 0 <= unseen < 1:
            raise RecipeError(f"unseen: expected a fraction from 0 to below 1, got {unseen}")
        count = max(count, 1) if unseen > 0 else 0
    if not 0 <= count < len(ids):
        raise RecipeError(
            f"unseen: expected fewer than the {len(ids)} clients, got {count}; someone must train"
        )
    return set(sorted(ids, key=lambda id: derive(seed, id, "unseen"))[:count])


def trim(
    groups: Groups,
    tasks: Tasks,
    table: Table,
    limit: int | None,
    min_examples: int,
    seed: int,
    skipped: list[Skipped],
) -> Groups:
    """Return the clients that are large enough, with `limit` examples at most in source order.

    What is left out is added to `skipped`.
    """
    trimmed: Groups = {}
    for id, group in sorted(groups.items()):
        if len(group) < min_examples:
            rows = [f"{id} row {table.rows[place]}" for place in group]
            skipped.append(Skipped({f"client below {min_examples} examples": rows}))
            continue
        trimmed[id] = group
        if limit is not None and len(group) > limit:
            order = {}
            for place in group:
                e = tasks.examples[place]
                order[place] = derive(seed, id, "limit", e.prompt, e.input, e.row)
            chosen = set(sorted(group, key=order.__getitem__)[:limit])
            rows = [f"{id} row {table.rows[place]}" for place in group if place not in chosen]
            skipped.append(Skipped({f"above the limit of {limit}": rows}))
            trimmed[id] = [place for place in group if place in chosen]
    return trimmed


def _natural(scheme: Scheme, table: Table, places: Sequence[int]) -> Groups:
    names = table.names[scheme.by]
    return {names[v]: own for v, own in by_value(places, table.codes[scheme.by]).items()}


def _iid(scheme: Scheme, table: Table, places: Sequence[int]) -> Groups:
    order = sorted(places, key=lambda place: derive(scheme.seed, "iid", table.rows[place]))
    return _contiguous(scheme, table, order)


def _contiguous(scheme: Scheme, _table: Table, places: Sequence[int]) -> Groups:
    return _numbered(contiguous(places, scheme.clients))


def _dirichlet(scheme: Scheme, table: Table, places: Sequence[int]) -> Groups:
    return _numbered(
        dirichlet(
            places,
            table.codes[scheme.on],
            scheme.clients,
            alpha=scheme.alpha,
            smallest=scheme.min_examples,
            seed=derive(scheme.seed, "dirichlet"),
        )
    )


EVEN: dict[str, Callable[[Scheme, Table, Sequence[int]], Groups]] = {
    "iid": _iid,
    "contiguous": _contiguous,
    "dirichlet": _dirichlet,
}


def _numbered(groups: Sequence[Sequence[int]]) -> Groups:
    digits = max(3, len(str(len(groups) - 1)))
    return {f"client-{index:0{digits}}": sorted(group) for index, group in enumerate(groups)}
