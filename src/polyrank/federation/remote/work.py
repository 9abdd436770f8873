"""Clients on other machines, as a run knows them: their names and sizes."""

from __future__ import annotations

from collections.abc import Iterable

from polyrank.data import ClientData, Clients, RowsElsewhere
from polyrank.federation.remote.packets import Hosted
from polyrank.federation.work import ClientWork, Part

PARTS: tuple[Part, ...] = ("train", "validation", "test")


def work_of(hosted: Hosted) -> ClientWork:
    """Return a client whose rows are counted and cannot be read here."""
    counts = hosted.counts
    return ClientWork(
        hosted.client,
        hosted.category,
        hosted.seen,
        {
            part: RowsElsewhere(
                hosted.client, counts[part].rows, counts[part].tokens, counts[part].targets
            )
            for part in PARTS
        },
        dict.fromkeys(PARTS, ()),
        hosted.fingerprint,
    )


def clients_of(hosted: Iterable[Hosted]) -> Clients:
    """Return the clients without their examples: who there is, and who is held out."""
    return Clients(ClientData(one.client, (), (), (), one.category, one.seen) for one in hosted)
