"""How a split client reaches the server that holds its tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from polyrank.training.split.messages import Reply, Request, Returned, Stepped


@dataclass(frozen=True)
class Traffic:
    """Bytes that a link has carried: requests up, replies down, as they are on the wire."""

    up: int = 0
    down: int = 0


class Pending(Protocol):
    """An answer that is on its way."""

    def result(self) -> Returned | Stepped:
        """Wait for the answer and return it.

        Raises FrameError if the server refused the request, or the answer does not fit it.
        """
        ...


class Link(Protocol):
    """A client's connection to its tail, for one client's work in one round.

    Several requests may be under way; answers come in the order of the requests. A request that is
    submitted again is answered again, and never applied twice.
    """

    def submit(self, request: Request) -> Pending:
        """Send a request and return at once; FrameError if it cannot be sent."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What was carried so far."""
        ...

    def close(self) -> None:
        """Give the connection up; the tail of unfinished work is discarded."""
        ...


class ServerPart(Protocol):
    """The server's end, as links see it: see `polyrank.training.split.tails.Tails`."""

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | None]:
        """Return the answers in the order of the requests, at most one of each client.

        What cannot be served is `Refused`, and the other requests are answered all the same. None
        is no answer yet: the request waits for other clients, nothing of it was done, and it is to
        be asked again with later ones, and when a client has left.
        """
        ...

    def leave(self, client: str) -> None:
        """Discard what a client's unfinished work has left here.

        Called whenever a link closes, for a link cannot know whether the work is finished: finished
        work stays, and a client that is not known here has left nothing.
        """
        ...
