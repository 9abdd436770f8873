"""Clients ready for work: their examples as token ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from polyrank.aggregation import Assignment
from polyrank.algebra import Adapter, LowRank
from polyrank.data import (
    ClientData,
    Clients,
    Encoded,
    Example,
    Skipped,
    TokenStore,
    encode_each,
    joined,
)
from polyrank.errors import DataError
from polyrank.model import LoadedModel
from polyrank.planning import ModelSpec
from polyrank.training.encoding import Encoding

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class ClientWork:
    """A client's encoded examples; ``rows[part][i].example`` indexes ``examples[part]``.

    Both may lie on disk, and are read as they are used (`polyrank.data.sizes` tells the sizes of
    rows without reading), or on another machine: then `fingerprint` is that of its data, as that
    machine says. A client that is held out has nothing to train on: those examples are
    among its test examples.
    """

    id: str
    category: str
    seen: bool
    rows: Mapping[Part, Sequence[Encoded]]
    examples: Mapping[Part, Sequence[Example]]
    fingerprint: str | None = None


def prepare(
    clients: Mapping[str, ClientData], model: LoadedModel, encoding: Encoding
) -> tuple[dict[str, ClientWork], Skipped]:
    """Return the clients' work, and what could not be used, by name, what `partition` left out too.

    Token ids go to a temporary file, client by client, so that memory does not grow with them.
    A training client left without a training example cannot take part: it is left out and named.
    Raises DataError if no training client is left, or if `max_length` exceeds the model's context.
    """
    context = model.spec.context
    length = encoding.max_length or context
    if length > context:
        raise DataError(
            f"data.max_length: {length} tokens are more than the context of {model.source}, "
            f"{context}; lower it, or take another model"
        )
    work: dict[str, ClientWork] = {}
    store = TokenStore()
    skipped = [clients.skipped] if isinstance(clients, Clients) else []
    for id, client in sorted(clients.items()):
        rows: dict[Part, Sequence[Encoded]] = {}
        parts: tuple[Part, ...] = ("train", "validation", "test")
        examples: dict[Part, Sequence[Example]] = {
            "train": client.train if client.seen else (),
            "validation": client.validation,
            "test": client.test if client.seen else joined(client.train, client.test),
        }
        for part in parts:
            missed: dict[str, list[str]] = {}
            encoded = encode_each(
                examples[part],
                model.tokenizer,
                missed,
                max_length=length,
                template=encoding.template,
                loss_on=encoding.loss_on,
                too_long=encoding.too_long,
                label=id,
            )
            rows[part] = store.extend(encoded)
            skipped.append(Skipped(missed))
        if client.seen and not rows["train"]:
            skipped.append(Skipped({"client without a usable training example": [id]}))
            continue
        work[id] = ClientWork(id, client.category, client.seen, rows, examples)
    total = Skipped.of(skipped)
    if not any(client.seen for client in work.values()):
        raise DataError(
            f"no client has a usable training example within {length} tokens; "
            f"{total.count} rows were skipped: "
            + ", ".join(f"{len(rows)} {reason}" for reason, rows in total.rows.items())
        )
    return work, total


def fingerprint(work: Mapping[str, ClientWork]) -> str:
    """Return a SHA-256 (hex) over all that training and scores read of the clients.

    That is who is seen, categories, parts, token ids with the positions of prompt and loss, and the
    references that generated text is compared with; of a client elsewhere, what its machine says.
    """
    digest = hashlib.sha256()
    for id in sorted(work):
        client = work[id]
        digest.update(repr((id, client.seen, client.category)).encode())
        if client.fingerprint is not None:
            digest.update(client.fingerprint.encode())
            continue
        for part in ("train", "validation", "test"):
            rows = client.rows[part]
            digest.update(f"{part}|{len(rows)}|".encode())
            for row in rows:
                digest.update(f"{row.prompt_length}|{row.loss_from}|{len(row.input_ids)}|".encode())
                digest.update(array("q", row.input_ids).tobytes())
                references = client.examples[part][row.example].references
                digest.update(repr(references).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def at_every_site(adapter: Adapter, spec: ModelSpec) -> Adapter:
    """Return the adapter with a zero of rank 0 at every site of the model that it lacks."""
    lacking = {s: LowRank.zero(*shape) for s, shape in spec.shapes.items() if s not in adapter}
    return Adapter({**lacking, **adapter})


def everywhere(assignment: Assignment, spec: ModelSpec) -> Assignment:
    """Return the assignment with a zero of rank 0 at the sites that the client leaves alone."""
    start = at_every_site(assignment.start, spec)
    return replace(assignment, start=start, scale={**dict.fromkeys(start, 1.0), **assignment.scale})
