"""The server's end of links, whatever carries the frames."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    RequestId,
    Step,
)
from polyrank.transport.frames import decode, encode
from polyrank.transport.layout import FrameLimits


@dataclass(frozen=True)
class ServingSettings:
    """How a split server treats its clients.

    `gather` is how many seconds the first request waits for those of the other clients that are
    served together with its own; None: until all who are at work have asked. With `turns` they are
    served one after the other instead, each until its request waits for the others. A client that
    sends nothing for `silence` seconds has left. `credit` requests of a client may be without reply
    at a time, and `streams` clients may be connected. Raises FrameError for values out of range.
    """

    gather: float | None = 0.02
    silence: float = 60.0
    credit: int = 8
    streams: int = 256
    turns: bool = False

    def __post_init__(self) -> None:
        if self.gather is not None and not (math.isfinite(self.gather) and self.gather >= 0):
            raise FrameError(f"split server, gather: expected 0 s or more; {self.gather} came")
        if not (math.isfinite(self.silence) and self.silence > 0):
            raise FrameError(f"split server, silence: expected more than 0 s; {self.silence} came")
        for name in ("credit", "streams"):
            if not 0 < getattr(self, name) < 2**16:
                raise FrameError(
                    f"split server, {name}: expected 1 to 65535; {getattr(self, name)} came"
                )


class FrameServer:
    """Reads the requests of some clients, has a server part answer them, and writes the replies.

    A frame comes from the client of its connection; it is refused if it names another client, if it
    is malformed, or if it is no request. A request that the server part leaves waiting for other
    clients is kept, and so are the frames of its client that come after it. `limits` are given for
    each client. Not thread-safe.
    """

    def __init__(self, server_part: ServerPart, limits: Mapping[str, FrameLimits]) -> None:
        self._server_part, self._limits = server_part, limits
        self._waiting: dict[str, deque[bytes]] = {}

    def answer(self, frames: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
        """Take in one frame of each of some clients; return the replies that are due, by client.

        The replies of a client come in the order of its frames. After a client has left, call it
        without frames too: other clients may have waited for that client.
        """
        for client, frame in frames.items():
            self._waiting.setdefault(client, deque()).append(frame)
        replies: list[tuple[str, bytes]] = []
        while answered := self._answer_oldest():
            replies += answered.items()
        return replies

    def _answer_oldest(self) -> dict[str, bytes]:
        """Return the replies to the oldest frames of all clients, from one call of the server part.

        A request that has no reply yet stays the oldest of its client.
        """
        frames = {client: queue.popleft() for client, queue in self._waiting.items()}
        self._waiting = {client: queue for client, queue in self._waiting.items() if queue}
        requests: dict[str, Request] = {}
        replies: dict[str, bytes] = {}
        for client, frame in frames.items():
            try:
                requests[client] = self._read(client, frame)
            except FrameError as error:
                refused = Refused(
                    RequestId(client, 0, 0, 0), str(error)
                )  # nothing else can be believed
                replies[client] = encode(refused, self._limits[client].codec)
        if not requests:
            return replies
        answers = self._server_part.answer(tuple(requests.values()))
        if len(answers) != len(requests):
            raise FrameError(f"server part: expected {len(requests)} answers; {len(answers)} came")
        for (client, request), reply in zip(requests.items(), answers, strict=True):
            if reply is None:
                self._waiting.setdefault(client, deque()).appendleft(frames[client])
            else:
                replies[client] = self._write(request, reply)
        return replies

    @property
    def waiting(self) -> frozenset[str]:
        """The clients whose oldest request waits for other clients."""
        return frozenset(self._waiting)

    def forget(self, client: str) -> None:
        """Drop a client's waiting frames, which it will send again; none of them was applied."""
        self._waiting.pop(client, None)

    def leave(self, client: str) -> None:
        """Tell the server part that a client's connection is closed; finished work stays."""
        self._waiting.pop(client, None)
        self._server_part.leave(client)

    def _read(self, client: str, frame: bytes) -> Request:
        message = decode(frame, self._limits[client])
        if message.id.client != client:
            raise FrameError(
                f"a frame of another client: expected one of {client!r} on this link; one of "
                f"{message.id.client!r} came"
            )
        if not isinstance(message, Activations | Gradients | Step):
            raise FrameError(f"expected a request; {type(message).__name__} came")
        return message

    def _write(self, request: Request, reply: Reply) -> bytes:
        codec = self._limits[request.id.client].codec
        try:
            return encode(reply, codec, request)
        except FrameError as error:  # not finite: the client must not train on it
            return encode(Refused(request.id, str(error)), codec)
