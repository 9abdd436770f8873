"""The scheduler's records: the clients of a round, their groups, and calls on its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.server_stream import ServerStream, StreamLimits
from polyrank.transport.remote.sessions import SessionId
from polyrank.transport.serving import FrameServer


@dataclass(eq=False)
class ServerGroup:
    """A server part and the clients that it serves."""

    server: FrameServer
    batcher: Batcher
    clients: tuple[str, ...]
    failed: bool = False


@dataclass(eq=False)
class ClientSlot:
    """A client of this round: its group, its newest stream, and what is known of it.

    At `deadline` it must have connected, or have sent something again. Its work has ended once
    there is a reason in `ended`; `failure` is that reason if it ended against the client's will.
    `up` and `down` are bytes of frames.
    """

    group: ServerGroup
    limits: StreamLimits
    session: SessionId
    deadline: float
    connected: bool = False
    stream: ServerStream | None = None
    ended: str | None = None
    failure: str | None = None
    up: int = 0
    down: int = 0

    def heard(self, now: float) -> None:
        """Note that the client has sent something."""
        self.connected = True
        self.deadline = now + self.limits.silence

    @property
    def timeout(self) -> str:
        """Why the client's work ends at its deadline."""
        if self.connected:
            return f"nothing came of the client for {self.limits.silence:g} s"
        return "the client did not connect before its token expired"


@dataclass(eq=False)
class ScheduledCall:
    """A function that waits to be run on the scheduler's thread."""

    run: Callable[[], object]
    done: threading.Event = field(default_factory=threading.Event)
    result: object = None
    error: BaseException | None = None

    def execute(self) -> None:
        """Run it and keep what it returns or raises."""
        try:
            self.result = self.run()
        except BaseException as error:
            self.error = error
        self.done.set()
