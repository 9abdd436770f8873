"""Which frames go to a tail together, and when."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """What is to be served now: first the held requests of `forgotten` are dropped."""

    forgotten: frozenset[str]
    frames: dict[str, bytes]


class Batcher:
    """The frames of one tail's clients that have come and were not served.

    They are served once every client that is waited for has one here, a request that the tail
    holds counting as one; or `gather` seconds after the first of them came. Those with an open
    stream are waited for. With `gather` None everyone is who has not left, as long as it takes.

    With `turns` nothing is served together: the first of the clients, in the order given, has its
    turn until the tail holds a request of it, then the next; so what a tail sums up does not depend
    on who came when. Times are those that the caller gives. Not thread-safe.
    """

    def __init__(
        self, clients: Collection[str], gather: float | None, *, turns: bool = False
    ) -> None:
        self._gather, self._turns = gather, turns
        self._at_work = set(clients)
        self._connected: set[str] = set()
        self._queues: dict[str, deque[tuple[float, bytes]]] = {one: deque() for one in clients}
        self._held: frozenset[str] = frozenset()
        self._forgotten: set[str] = set()
        self._again = False

    def connect(self, client: str) -> None:
        """Take note of a new stream of a client; what came on an older one is dropped."""
        self._connected.add(client)
        self._queues[client].clear()
        self._forgotten.add(client)

    def disconnect(self, client: str) -> None:
        """Take note that a client has no stream; what came on it stays."""
        self._connected.discard(client)

    def add(self, client: str, frame: bytes, now: float) -> None:
        """Take in a frame of a client that is at work."""
        if client in self._at_work:
            self._queues[client].append((now, frame))

    def leave(self, client: str) -> None:
        """Wait for a client no more; the tail is to be asked again for those that it holds."""
        self._at_work.discard(client)
        self._connected.discard(client)
        self._queues[client].clear()
        self._held -= {client}
        self._again = bool(self._held)

    def wait(self, now: float) -> float | None:
        """Return how many seconds there are until frames are to be served; None: not foreseen."""
        first = min((queue[0][0] for queue in self._queues.values() if queue), default=None)
        if self._again:
            return 0.0
        if self._turns:
            return 0.0 if self._ready() else None
        if first is None:
            return None
        here = {client for client, queue in self._queues.items() if queue} | (
            self._held - self._forgotten
        )
        waited_for = self._at_work if self._gather is None else self._connected
        if waited_for <= here:
            return 0.0
        return None if self._gather is None else max(0.0, first + self._gather - now)

    def take(self) -> Taken:
        """Hand over the oldest frame of every client that has one."""
        forgotten, self._again = frozenset(self._forgotten), False
        ready = self._ready()
        self._forgotten = set()
        return Taken(forgotten, {client: self._queues[client].popleft()[1] for client in ready})

    def _ready(self) -> list[str]:
        """The clients whose oldest frame is to be served now."""
        if not self._turns:
            return [client for client, queue in self._queues.items() if queue]
        held = self._held - self._forgotten
        turn = next((one for one in self._queues if one in self._at_work - held), None)
        return [turn] if turn is not None and self._queues[turn] else []

    def hold(self, clients: frozenset[str]) -> None:
        """Take note of whose requests the tail holds after it was asked."""
        self._held = clients & self._at_work
