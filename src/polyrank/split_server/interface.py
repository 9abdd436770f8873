"""The split server as the run's engine sees it: what it is asked to train, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from polyrank.algebra import Adapter, Delta, Dense
from polyrank.planning.traffic import WireBytes
from polyrank.training.split import ServerPartJob

if TYPE_CHECKING:  # It needs gRPC, and an engine without split clients does not.
    from polyrank.transport.remote.credentials import Credentials


@dataclass(frozen=True)
class OpenRound:
    """The server's work in one round and attempt.

    The assignments of `jobs` come without what is merged into the base: `merged` is the same for
    all clients and given once. `tokens` is the most tokens of a frame, by client. Clients may
    connect for `seconds`, the time until the round's deadline.
    """

    round: int
    attempt: int
    jobs: Sequence[ServerPartJob]
    merged: Adapter[Dense]
    tokens: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class ServerPartResult:
    """What the server has trained for one client: of its own sites alone, on the CPU.

    `importance` is the mean score per site, empty if none was measured; `traffic` the bytes of the
    client's frames as the server counted them.
    """

    adapter: Adapter[Delta]
    importance: Mapping[str, float] = field(default_factory=dict)
    traffic: WireBytes = field(default_factory=WireBytes)


@dataclass(frozen=True)
class ClientStatus:
    """How far a split client is: `step` of `steps` taken at the server, bytes of frames so far.

    `connected` says that the client has sent something and has not left.
    """

    connected: bool
    step: int
    steps: int
    up: int
    down: int


class SplitServerHandle(Protocol):
    """Trains the server-side parts of a round's split clients."""

    def open(self, work: OpenRound) -> Mapping[str, Credentials | str]:
        """Return, by client, how it reaches the server, or the reason why it cannot.

        Ends the round that is open. Starts the server if it does not run; if it has run before and
        cannot be started again, that is the reason of every client.

        Raises SplitServerError if it cannot be started the first time: then the settings are wrong.
        """
        ...

    def collect(self, client: str) -> ServerPartResult:
        """Return what was trained for a client that has taken all its steps.

        Raises SplitServerError if it has not taken them, or if the server has died since `open`:
        the round's training is then lost for all of its clients.
        """
        ...

    def status(self) -> Mapping[str, ClientStatus]:
        """Return how far each client of the round is, as last known; waits for nothing."""
        ...

    def leave(self, client: str) -> None:
        """Discard a client's unfinished work and end its stream with a reason; never raises."""
        ...

    def close(self) -> None:
        """End the round and discard what was not collected; never raises.

        The server keeps running for the next `open`.
        """
        ...

    def stop(self) -> None:
        """End the server; never raises."""
        ...
