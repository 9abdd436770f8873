"""A split client's link to the split server on another machine."""

from __future__ import annotations

import time
from collections import deque

from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.training.split.messages import Request
from polyrank.transport.pending import PendingFrame, write_request
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.reconnecting_stream import ReconnectingStream


class GrpcLink:
    """A client's connection to the split server that its credentials name: a `Link`.

    It connects at once, in the background, and again when its stream breaks; requests without a
    reply are then sent again, and nothing is applied twice. It fails if nothing has come for
    `credentials.patience` seconds of waiting, or the server ends the work, does not accept the
    token, or does not have the pinned certificate. To be used from one thread.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.client, self.limits = credentials.client, credentials.limits
        self._stream = ReconnectingStream(credentials)
        self._unanswered: deque[PendingFrame] = deque()
        self._closed = False

    def __repr__(self) -> str:
        return f"GrpcLink({self._stream.credentials})"

    def submit(self, request: Request) -> PendingFrame:
        """Encode a request and send it; waits while the server's credit is used up.

        Raises FrameError if it cannot be sent, if the link has failed, or after `close`.
        """
        if self._closed:
            raise FrameError(f"{request.id}: the link is closed; open a new one")
        frame = write_request(request, self.limits)
        try:
            self._stream.send(frame)
        except FrameError as error:
            raise FrameError(f"{request.id}: {error}") from error
        since = time.monotonic()
        pending = PendingFrame(request, self.limits, lambda: self._receive(since))
        self._unanswered.append(pending)
        return pending

    @property
    def traffic(self) -> WireBytes:
        """The bytes of all frames that were carried, those that were sent again included."""
        return self._stream.traffic

    def close(self) -> None:
        """Say Bye, within 2 s, and close the link; the server discards unfinished work."""
        if not self._closed:
            self._closed = True
            self._unanswered.clear()
            self._stream.close()

    def _receive(self, since: float) -> None:
        """Wait for the next reply and give it to the oldest request without one.

        `since` is when the request was sent: patience begins then, at the earliest.
        """
        if self._closed:
            raise FrameError("the link is closed")
        frame = self._stream.receive(since)
        self._unanswered.popleft().deliver(frame)
