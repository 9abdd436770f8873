"""The split server as the engine sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from polyrank.algebra import Adapter, Delta, Dense
from polyrank.training.split import ServerPartJob, Traffic

if TYPE_CHECKING:  # It needs gRPC, and an engine without split clients does not.
    from polyrank.transport.remote.credentials import Credentials


@dataclass(frozen=True)
class Collected:
    """What the server has trained for one client: of its own sites alone, on the CPU.

    `importance` is the mean score per site, empty if none was measured; `traffic` the bytes of the
    client's frames as the server counted them.
    """

    adapter: Adapter[Delta]
    importance: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class ClientStatus:
    """How far a split client is: `step` of `steps` taken at the server, bytes of frames so far.

    `connected` says that it has been heard of and has not left.
    """

    connected: bool
    step: int
    steps: int
    up: int
    down: int


class SplitServerHandle(Protocol):
    """Opens tails for a round's split clients, and hands out what was trained of them."""

    def open(
        self,
        round: int,
        attempt: int,
        jobs: Sequence[ServerPartJob],
        merged: Adapter[Dense],
        tokens: Mapping[str, int],
        seconds: float,
    ) -> Mapping[str, Credentials | str]:
        """Return how each client reaches its tail, or the reason why it has none.

        The jobs come without what is merged into the base, which is the same for all and given
        once. `tokens` is the most tokens of a client's frame, `seconds` the time until the deadline
        of the round. A split server that is not there is started; one that had worked before and
        cannot be started again is the reason that every client gets.

        Raises SplitServerError if it cannot be started the first time: then the settings are wrong.
        """
        ...

    def collect(self, client: str) -> Collected:
        """Return what was trained for a client that has taken all its steps.

        Raises SplitServerError if it has not, or the server has died since `open`: what it had
        trained in this round is lost then, for all of its clients.
        """
        ...

    def status(self) -> Mapping[str, ClientStatus]:
        """Return how far each client of the round is; what was last known, without waiting."""
        ...

    def leave(self, client: str) -> None:
        """Give up a client's unfinished tail, whose stream is ended with a reason; never raises."""
        ...

    def close(self) -> None:
        """End the round or the attempt, and all that was trained and not collected; never raises.

        The server stays for the next `open`.
        """
        ...

    def stop(self) -> None:
        """End the server; never raises."""
        ...
