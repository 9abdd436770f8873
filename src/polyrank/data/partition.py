"""Clients from tasks: who has which examples, and who is held out."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyrank.data.clients import Clients
from polyrank.data.extras import need
from polyrank.data.split import check_fractions, split
from polyrank.data.types import ClientData, Example, Skipped, Tasks
from polyrank.errors import DataError, RecipeError
from polyrank.seeds import derive

Groups = dict[str, list[Example]]
Unseen = str | Sequence[str] | int | float | None


@dataclass(frozen=True)
class Scheme:
    """The settings of a partition that the partitioners read; see `partition`."""

    by: str
    clients: int | None
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
    """Return the tasks dealt out to clients, each split into training, validation and test.

    `by` names a column, each of whose values becomes a client (one task, one client); or it is
    ``iid`` (shuffled, equal), ``contiguous`` (equal, in the source's order) or ``dirichlet`` (the
    share of each value of column `on` among clients is drawn from Dirichlet(`alpha`); arXiv
    1905.12022), each with a number of `clients`. The partitioners are those of flwr-datasets.

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
    scheme = Scheme(by, clients, alpha, on, seed, min_examples)
    _check(scheme, limit)
    if isinstance(unseen, bool):
        raise RecipeError("unseen: expected a column, clients, a number or a fraction, got a bool")
    skipped = tasks.skipped

    examples = tasks.examples
    if len({example.row for example in examples}) < len(examples):
        raise DataError(
            f"{tasks.source}: expected every example to have a row number of its own; number the "
            "examples of joined sources anew"
        )
    needed = {"dirichlet": on, "iid": None, "contiguous": None}.get(by, by)
    if needed is not None:
        _require(examples, needed, tasks.source, "to partition by")
        lacking = [f"row {e.row}" for e in examples if needed not in e.columns]
        if lacking:
            skipped = skipped + Skipped({f"no {needed}": lacking})
            examples = tuple(e for e in examples if needed in e.columns)

    flagged = _flagged(tasks, examples, unseen)
    if by in EVEN:
        dealt = [e for e in examples if e.row not in flagged]
        if clients is not None and clients > len(dealt):
            raise DataError(
                f"{tasks.source}: {len(dealt)} examples are too few for {clients} clients; lower "
                "clients"
            )
        groups = EVEN[by](scheme, dealt)
        if flagged:
            groups["unseen"] = [e for e in examples if e.row in flagged]
        held_out = {"unseen"} if flagged else set()
    else:
        groups = _natural(scheme, examples)
        held_out = {id for id, group in groups.items() if group[0].row in flagged}
        for id, group in groups.items():
            if len({e.row in flagged for e in group}) > 1:
                raise DataError(
                    f"{tasks.source}: client {id!r} is held out in some rows and not in others; a "
                    "client is held out entirely or takes part"
                )

    groups, missed = _trim(groups, limit, min_examples, seed)
    if not isinstance(unseen, str | None):
        held_out = _choose(unseen, sorted(groups), seed)
    return Clients(
        (
            ClientData(
                id,
                *split(group, shares, seed, id),
                category=_category(group, on),
                seen=id not in held_out,
            )
            for id, group in groups.items()
        ),
        skipped + missed,
    )


def _check(scheme: Scheme, limit: int | None) -> None:
    if scheme.by in EVEN:
        if scheme.clients is None or scheme.clients < 1:
            raise RecipeError(
                f"partition by {scheme.by}: expected a number of clients of at least 1, got "
                f"{scheme.clients}"
            )
        if not 0 < scheme.alpha < float("inf"):
            raise RecipeError(f"partition: expected an alpha above 0, got {scheme.alpha}")
    elif scheme.clients is not None:
        raise RecipeError(
            f"partition by the column {scheme.by!r}: its values are the clients, so clients = "
            f"{scheme.clients} has no meaning; leave it out, or partition by {', '.join(EVEN)}"
        )
    for name, value in (("limit", limit), ("min_examples", scheme.min_examples)):
        if value is not None and value < 1:
            raise RecipeError(f"partition: expected {name} of at least 1, got {value}")


def _require(examples: Sequence[Example], column: str, source: str, purpose: str) -> None:
    if not any(column in example.columns for example in examples):
        known = dict.fromkeys(name for example in examples for name in example.columns)
        raise DataError(
            f"{source}: no column {column!r} {purpose}; the columns are {', '.join(known)}"
        )


def _flagged(tasks: Tasks, examples: Sequence[Example], unseen: Unseen) -> set[int]:
    """Return the rows that a column holds out; empty if no column decides."""
    if not isinstance(unseen, str | None):
        return set()
    if unseen is not None:
        _require(examples, unseen, tasks.source, "to say who is held out")
    column = unseen or "unseen"
    words = {"true": True, "1": True, "false": False, "0": False, "": False}
    flagged = set()
    for example in examples:
        value = example.columns.get(column, "")
        if value.strip().lower() not in words:
            raise DataError(
                f"{tasks.source}, row {example.row}: expected true or false in column {column!r}, "
                f"which says who is held out, got {value!r}; correct it, or say otherwise with "
                "unseen (0 for nobody)"
            )
        if words[value.strip().lower()]:
            flagged.add(example.row)
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


def _trim(
    groups: Groups, limit: int | None, min_examples: int, seed: int
) -> tuple[Groups, Skipped]:
    """Return the clients that are large enough, with `limit` examples at most in source order."""
    kept: Groups = {}
    skipped = Skipped()
    for id, group in sorted(groups.items()):
        if len(group) < min_examples:
            rows = [f"{id} row {example.row}" for example in group]
            skipped = skipped + Skipped({f"client below {min_examples} examples": rows})
            continue
        if limit is not None and len(group) > limit:
            order = sorted(group, key=lambda e: derive(seed, id, "limit", e.prompt, e.input, e.row))
            chosen = {example.row for example in order[:limit]}
            rows = [f"{id} row {e.row}" for e in group if e.row not in chosen]
            skipped = skipped + Skipped({f"above the limit of {limit}": rows})
            group = [e for e in group if e.row in chosen]
        kept[id] = group
    return kept, skipped


def _category(group: Sequence[Example], on: str) -> str:
    values = {example.columns.get(on, "") for example in group}
    return values.pop() if len(values) == 1 else ""


def _natural(scheme: Scheme, examples: Sequence[Example]) -> Groups:
    partitioner = need("flwr_datasets.partitioner").NaturalIdPartitioner("key")
    groups = _run(partitioner, examples, [example.columns[scheme.by] for example in examples])
    names: Mapping[int, str] = partitioner.partition_id_to_natural_id
    return {names[index]: group for index, group in enumerate(groups)}


def _iid(scheme: Scheme, examples: Sequence[Example]) -> Groups:
    order = sorted(examples, key=lambda e: derive(scheme.seed, "iid", e.row))
    return _contiguous(scheme, order)  # the partitioner itself takes rows as they lie


def _contiguous(scheme: Scheme, examples: Sequence[Example]) -> Groups:
    partitioner = need("flwr_datasets.partitioner").IidPartitioner(scheme.clients)
    return _numbered(_run(partitioner, examples, [""] * len(examples)))


def _dirichlet(scheme: Scheme, examples: Sequence[Example]) -> Groups:
    partitioner = need("flwr_datasets.partitioner").DirichletPartitioner(
        num_partitions=scheme.clients,
        partition_by="key",
        alpha=float(scheme.alpha),
        min_partition_size=scheme.min_examples,
        shuffle=False,
        seed=derive(scheme.seed, "dirichlet"),
    )
    return _numbered(_run(partitioner, examples, [e.columns[scheme.on] for e in examples]))


EVEN: dict[str, Callable[[Scheme, Sequence[Example]], Groups]] = {
    "iid": _iid,
    "contiguous": _contiguous,
    "dirichlet": _dirichlet,
}


def _numbered(groups: Sequence[list[Example]]) -> Groups:
    digits = max(3, len(str(len(groups) - 1)))
    return {
        f"client-{index:0{digits}}": sorted(group, key=lambda example: example.row)
        for index, group in enumerate(groups)
    }


def _run(partitioner: Any, examples: Sequence[Example], keys: Sequence[str]) -> list[list[Example]]:
    """Return the examples of each partition, without the partitioner's progress bar."""
    data = need("datasets").Dataset.from_dict({"index": range(len(keys)), "key": keys})
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            partitioner.dataset = data
            parts = [
                partitioner.load_partition(number)["index"][:]
                for number in range(partitioner.num_partitions)
            ]
        except (ValueError, IndexError) as error:
            raise DataError(
                f"partition: {len(examples)} examples cannot be dealt out as asked ({error}); "
                "change clients, alpha or min_examples"
            ) from error
    return [[examples[index] for index in part] for part in parts]
