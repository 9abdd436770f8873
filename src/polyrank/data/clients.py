"""The clients of a run: their data, seen and unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from polyrank.data.types import ClientData, Skipped
from polyrank.errors import DataError


@dataclass(frozen=True)
class Summary:
    """How much data there is: clients, and examples over all clients by part.

    `short` names the clients that had too few different prompts for all three parts.
    """

    seen: int
    unseen: int
    train: int
    validation: int
    test: int
    held_out: int
    skipped: int
    short: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.seen} clients ({self.train} examples to train, {self.validation} to validate, "
            f"{self.test} to test), {self.unseen} held out ({self.held_out} examples)"
        )
        if self.skipped:
            text += f"; {self.skipped} rows not used"
        if self.short:
            names = ", ".join(self.short[:5]) + (", …" if len(self.short) > 5 else "")
            text += f"; {len(self.short)} clients too small for three parts: {names}"
        return text


class Clients(Mapping[str, ClientData]):
    """A read-only mapping from a client's id to its data, in the order of the ids.

    `skipped` names the rows of the source that no client has. Raises DataError if two clients have
    one id or none takes part in training.
    """

    def __init__(self, clients: Iterable[ClientData], skipped: Skipped | None = None):
        listed = sorted(clients, key=lambda client: client.id)
        self._clients = {client.id: client for client in listed}
        self.skipped = skipped or Skipped()
        if len(self._clients) < len(listed):
            ids = [client.id for client in listed]
            twice = sorted({id for id in ids if ids.count(id) > 1})
            raise DataError(f"clients: expected one client per id, got several for {twice}")
        if not self.seen:
            raise DataError(
                f"clients: none of the {len(listed)} takes part in training; hold out fewer, or "
                "lower min_examples"
            )

    def __getitem__(self, id: str) -> ClientData:
        return self._clients[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __repr__(self) -> str:
        return f"Clients({self.summary()})"

    @property
    def seen(self) -> dict[str, ClientData]:
        """The clients that take part in training."""
        return {id: client for id, client in self.items() if client.seen}

    @property
    def unseen(self) -> dict[str, ClientData]:
        """The clients that are held out entirely, for zero-shot evaluation."""
        return {id: client for id, client in self.items() if not client.seen}

    def summary(self) -> Summary:
        """Return the counts; ``str`` of them is one line for people."""
        seen, unseen = self.seen.values(), self.unseen.values()
        return Summary(
            seen=len(seen),
            unseen=len(unseen),
            train=sum(len(client.train) for client in seen),
            validation=sum(len(client.validation) for client in seen),
            test=sum(len(client.test) for client in seen),
            held_out=sum(len(client.examples) for client in unseen),
            skipped=self.skipped.count,
            short=tuple(id for id, c in self.items() if not (c.train and c.validation and c.test)),
        )

    def hash(self) -> str:
        """Return a SHA-256 (hex) over clients, parts and texts: equal data, equal hash."""
        digest = hashlib.sha256()
        for id, client in self.items():
            for name, part in (
                ("train", client.train),
                ("validation", client.validation),
                ("test", client.test),
            ):
                head = (id, client.seen, client.category, name)
                digest.update(repr(head).encode())
                for example in part:
                    text = repr((example.prompt, example.input, example.references))
                    digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
