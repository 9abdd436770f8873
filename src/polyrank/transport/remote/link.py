"""A client's link to its tail on another machine."""

from __future__ import annotations

import time
from collections import deque

from polyrank.errors import FrameError
from polyrank.training.split.link import Traffic
from polyrank.training.split.messages import Request, Returned, Stepped
from polyrank.transport.awaited import Awaited, write_request
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.reconnecting_stream import ReconnectingStream


class GrpcLink:
    """A client's connection to the split server that its order names: a `Link`.

    It connects at once, in the background, and again when its stream breaks; what has no reply is
    then sent again, and nothing is applied twice. It fails if nothing has come for
    `access.patience` seconds of waiting, or the server ends the work, does not accept the token, or
    is another one than the certificate says. To be used from one thread.
    """

    def __init__(self, access: Credentials) -> None:
        self.client, self.limits = access.client, access.limits
        self._line = ReconnectingStream(access)
        self._waiting: deque[GrpcTicket] = deque()
        self._closed = False

    def __repr__(self) -> str:
        return f"GrpcLink({self._line.access})"

    def submit(self, request: Request) -> GrpcTicket:
        """Encode a request and have it sent; waits while as many have no reply as may be.

        Raises FrameError if it cannot be sent, if the link has failed, or after `close`.
        """
        if self._closed:
            raise FrameError(f"{request.at}: the link is closed; open a new one")
        frame = write_request(request, self.limits)
        try:
            self._line.send(frame)
        except FrameError as error:
            raise FrameError(f"{request.at}: {error}") from error
        ticket = GrpcTicket(self, Awaited.of(request))
        self._waiting.append(ticket)
        return ticket

    @property
    def traffic(self) -> Traffic:
        """The bytes of all frames that were carried, those that were sent again included."""
        return self._line.traffic

    def receive(self, since: float) -> None:
        """Wait for the next reply and give it to the oldest request that has none.

        FrameError if none will come; `since` is when waiting began, at the earliest.
        """
        if self._closed:
            raise FrameError("the link is closed")
        frame = self._line.receive(since)
        self._waiting.popleft().deliver(frame)

    def close(self) -> None:
        """Say Bye, within 2 s, and give the link up; the server discards unfinished work."""
        if not self._closed:
            self._closed = True
            self._waiting.clear()
            self._line.close()


class GrpcTicket:
    """An answer that is on its way through a `GrpcLink`."""

    def __init__(self, link: GrpcLink, awaited: Awaited) -> None:
        self._link = link
        self._awaited = awaited
        self._since = time.monotonic()
        self._reply: bytes | None = None
        self._answer: Returned | Stepped | None = None

    def deliver(self, reply: bytes) -> None:
        """Keep the reply until it is asked for."""
        self._reply = reply

    def result(self) -> Returned | Stepped:
        """Wait for the answer and return it."""
        if self._answer is None:
            while self._reply is None:
                try:
                    self._link.receive(self._since)
                except FrameError as error:
                    raise FrameError(f"{self._awaited.at}: no answer came: {error}") from error
            self._answer = self._awaited.read(self._reply, self._link.limits)
            self._reply = b""
        return self._answer
