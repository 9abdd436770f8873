"""What is known of the clients and tails of a round."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.server_stream import ServerStream, Terms
from polyrank.transport.remote.sessions import Work
from polyrank.transport.serving import Serving


@dataclass(eq=False)
class ServerGroup:
    """A tail and those whom it serves."""

    serving: Serving
    gathering: Batcher
    clients: tuple[str, ...]
    failed: bool = False


@dataclass(eq=False)
class ClientSlot:
    """A client of this round: its table, its newest stream, and what is known of it.

    `until` is when it has to have come, or to have been heard of again. Its work is over once there
    is a reason in `over`; `failure` is that reason if it was ended against the client's will. `up`
    and `down` are bytes of frames.
    """

    table: ServerGroup
    terms: Terms
    work: Work
    until: float
    came: bool = False
    stream: ServerStream | None = None
    over: str | None = None
    failure: str | None = None
    up: int = 0
    down: int = 0

    def heard(self, now: float) -> None:
        """Take note that something came of the client."""
        self.came = True
        self.until = now + self.terms.silence

    @property
    def silence(self) -> str:
        """Why a client leaves of which nothing has come by `until`."""
        if self.came:
            return f"nothing came of the client for {self.terms.silence:g} s"
        return "the client did not come before its token expired"


@dataclass(eq=False)
class Call:
    """A function that waits to be run on the thread."""

    run: Callable[[], object]
    done: threading.Event = field(default_factory=threading.Event)
    result: object = None
    error: BaseException | None = None

    def carry_out(self) -> None:
        """Run it and keep what it returns or raises."""
        try:
            self.result = self.run()
        except BaseException as error:
            self.error = error
        self.done.set()
