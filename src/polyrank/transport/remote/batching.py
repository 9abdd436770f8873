"""Batching of clients' frames: those that are served together."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Frames to serve now, after the waiting requests of the `forgotten` clients are dropped."""

    forgotten: frozenset[str]
    frames: dict[str, bytes]


class Batcher:
    """Collects the frames of the clients of one server part until they are served.

    They are served once every expected client has a frame here, or a request that waits at the
    server part; or `gather` seconds after the first frame came. The clients with an open stream are
    expected. With `gather` None all clients that have not left are, for as long as it takes.

    With `turns` no frames are served together: the first of the clients, in the order given, is
    served until a request of its waits at the server part, then the next; so what the server part
    sums up does not depend on the order in which frames come. The caller gives the time, in
    seconds. Not thread-safe.
    """

    def __init__(
        self, clients: Collection[str], gather: float | None, *, turns: bool = False
    ) -> None:
        self._gather, self._turns = gather, turns
        self._working = set(clients)
        self._connected: set[str] = set()
        self._queues: dict[str, deque[tuple[float, bytes]]] = {name: deque() for name in clients}
        self._waiting: frozenset[str] = frozenset()
        self._forgotten: set[str] = set()
        self._ask_again = False

    def connect(self, client: str) -> None:
        """Note a new stream of a client; frames of its older stream are dropped."""
        self._connected.add(client)
        self._queues[client].clear()
        self._forgotten.add(client)

    def disconnect(self, client: str) -> None:
        """Note that a client has no stream; the frames that came on it stay."""
        self._connected.discard(client)

    def add(self, client: str, frame: bytes, now: float) -> None:
        """Take in a frame; that of a client that has left is dropped."""
        if client in self._working:
            self._queues[client].append((now, frame))

    def leave(self, client: str) -> None:
        """Expect a client no more; requests that wait for it are to be asked again."""
        self._working.discard(client)
        self._connected.discard(client)
        self._queues[client].clear()
        self._waiting -= {client}
        self._ask_again = bool(self._waiting)

    def wait(self, now: float) -> float | None:
        """Return the seconds until frames are to be served; None if that is not known yet."""
        first = min((queue[0][0] for queue in self._queues.values() if queue), default=None)
        if self._ask_again:
            return 0.0
        if self._turns:
            return 0.0 if self._ready() else None
        if first is None:
            return None
        present = {client for client, queue in self._queues.items() if queue} | (
            self._waiting - self._forgotten
        )
        expected = self._working if self._gather is None else self._connected
        if expected <= present:
            return 0.0
        return None if self._gather is None else max(0.0, first + self._gather - now)

    def take(self) -> Batch:
        """Hand over the frames to serve now, the oldest of each client."""
        forgotten, self._ask_again = frozenset(self._forgotten), False
        ready = self._ready()
        self._forgotten = set()
        return Batch(forgotten, {client: self._queues[client].popleft()[1] for client in ready})

    def set_waiting(self, clients: frozenset[str]) -> None:
        """Note which clients' requests wait at the server part, after a batch was served."""
        self._waiting = clients & self._working

    def _ready(self) -> list[str]:
        """Return the clients whose oldest frame is to be served now."""
        if not self._turns:
            return [client for client, queue in self._queues.items() if queue]
        waiting = self._waiting - self._forgotten
        turn = next((name for name in self._queues if name in self._working - waiting), None)
        return [turn] if turn is not None and self._queues[turn] else []
