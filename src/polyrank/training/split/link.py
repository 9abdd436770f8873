"""The interfaces between a split client and the server: a link, and the server part behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polyrank.planning.traffic import WireBytes
from polyrank.training.split.messages import Reply, Request, Returned, Stepped


class PendingReply(Protocol):
    """A reply that has been asked for and may not have come yet."""

    def result(self) -> Returned | Stepped:
        """Wait for the reply and return it.

        Raises FrameError if the server refused the request, or the reply does not fit it.
        """
        ...


class Link(Protocol):
    """A client's connection to the server, for one client's work in one round.

    Several requests may be in flight; replies come in the order of the requests. A request that is
    submitted again is answered again, and never applied twice.
    """

    def submit(self, request: Request) -> PendingReply:
        """Send a request and return at once; FrameError if it cannot be sent."""
        ...

    @property
    def traffic(self) -> WireBytes:
        """The bytes carried so far."""
        ...

    def close(self) -> None:
        """Close the connection; the server discards unfinished work."""
        ...


class ServerPart(Protocol):
    """The server's end, as links see it: `polyrank.training.split.server_parts.ServerParts`."""

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | None]:
        """Return the replies in the order of the requests, at most one of each client.

        A request that cannot be served is `Refused`; the other requests are answered all the same.
        None means no reply yet: the request waits for other clients, and nothing of it was applied.
        Call again with it when later requests come, and when a client has left.
        """
        ...

    def leave(self, client: str) -> None:
        """Discard a client's unfinished work.

        Called whenever a link closes, because a link cannot know whether the work is finished:
        finished work stays, and an unknown client has no work to discard.
        """
        ...
