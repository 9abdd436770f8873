"""The server's end of links, whatever carries the frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart
from polyrank.training.split.messages import (
    Activations,
    At,
    Gradients,
    Refused,
    Reply,
    Request,
    Step,
)
from polyrank.transport.frames import decode, encode
from polyrank.transport.layout import Limits


class Serving:
    """Frames in, frames out: reads requests, has the tail answer them, and writes the replies.

    A frame is known to come from one client, that of its connection; it is refused if it says
    otherwise, if it is malformed, or if it is no request. A request that the tail lets wait for
    other clients is kept, and so are the frames of its client that come after it. `limits` hold for
    the clients that have none of their own in `special`. Not thread-safe.
    """

    def __init__(
        self, tail: ServerPart, limits: Limits, special: Mapping[str, Limits] | None = None
    ) -> None:
        self._tail = tail
        self._limits = limits
        self._special = dict(special or {})
        self._waiting: dict[str, deque[bytes]] = {}

    def answer(self, frames: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
        """Take in one frame of each of some clients; return the replies that are due, by client.

        Those of a client come in the order of its frames. After a client has left, call it without
        frames too: others may have waited for that one.
        """
        for client, frame in frames.items():
            self._waiting.setdefault(client, deque()).append(frame)
        replies: list[tuple[str, bytes]] = []
        while found := self._oldest_answered():
            replies += found.items()
        return replies

    def _oldest_answered(self) -> dict[str, bytes]:
        """Return the replies to the oldest frame of every client; the tail is asked once for all.

        What waits stays the oldest of its client.
        """
        frames = {client: queue.popleft() for client, queue in self._waiting.items()}
        self._waiting = {client: queue for client, queue in self._waiting.items() if queue}
        requests: dict[str, Request] = {}
        replies: dict[str, bytes] = {}
        for client, frame in frames.items():
            try:
                requests[client] = self._read(client, frame)
            except FrameError as error:
                replies[client] = self.refuse(client, str(error))
        if not requests:
            return replies
        answers = self._tail.answer(tuple(requests.values()))
        if len(answers) != len(requests):
            raise FrameError(f"the tail: expected {len(requests)} answers; {len(answers)} came")
        for (client, request), reply in zip(requests.items(), answers, strict=True):
            if reply is None:
                self._waiting.setdefault(client, deque()).appendleft(frames[client])
            else:
                replies[client] = self._write(request, reply)
        return replies

    def refuse(self, client: str, reason: str) -> bytes:
        """Return the reply to a frame of which nothing can be believed but where it came from."""
        return encode(Refused(At(client, 0, 0, 0), reason), self._limits_of(client).codec)

    @property
    def waiting(self) -> frozenset[str]:
        """The clients that have a request here that waits for others."""
        return frozenset(self._waiting)

    def forget(self, client: str) -> None:
        """Drop what waits here of a client, which will send it again; nothing of it was done."""
        self._waiting.pop(client, None)

    def leave(self, client: str) -> None:
        """Tell the tail that a client's connection is closed; finished work stays there."""
        self._waiting.pop(client, None)
        self._tail.leave(client)

    def _read(self, client: str, frame: bytes) -> Request:
        message = decode(frame, self._limits_of(client))
        if message.at.client != client:
            raise FrameError(
                f"a frame of another client: expected one of {client!r} on this link; one of "
                f"{message.at.client!r} came"
            )
        if not isinstance(message, Activations | Gradients | Step):
            raise FrameError(f"expected a request; {type(message).__name__} came")
        return message

    def _write(self, request: Request, reply: Reply) -> bytes:
        wire = self._limits_of(request.at.client).codec
        try:
            return encode(reply, wire, request)
        except FrameError as error:  # not finite: the client must not train on it
            return encode(Refused(request.at, str(error)), wire)

    def _limits_of(self, client: str) -> Limits:
        return self._special.get(client, self._limits)
