"""Seconds of an optimizer step and of a round, from operations, bytes, and what machines can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from polyrank.planning.cut import CutPoint
from polyrank.planning.traffic import WireBytes


class Machine(Protocol):
    """What a `DeviceProfile` says of speed; None is not considered.

    `flops` in operations per second, `up` and `down` in bytes per second, `latency` one way, in
    seconds.
    """

    @property
    def flops(self) -> float | None: ...  # noqa: D102
    @property
    def up(self) -> float | None: ...  # noqa: D102
    @property
    def down(self) -> float | None: ...  # noqa: D102
    @property
    def latency(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Seconds:
    """Time of one optimizer step and of one round.

    `ignored` names the figures that were not given and that therefore take no time.
    """

    step: float
    round: float
    ignored: tuple[str, ...] = ()


class Clock:
    """Times of one client and its server; notes which figures it would have needed.

    A link is as fast as the slower of its ends, and a message takes the latency of both.
    """

    def __init__(self, device: Machine, server: Machine):
        self._device, self._server = device, server
        self._ignored: dict[str, None] = {}

    @property
    def ignored(self) -> tuple[str, ...]:
        """What was asked for and not given, in order."""
        return tuple(self._ignored)

    def client(self, operations: int) -> float:
        """Return the seconds of so many operations at the client."""
        return self._over(operations, "device.flops", self._device.flops)

    def server(self, operations: int) -> float:
        """Return the seconds of so many operations at the server."""
        return self._over(operations, "server.flops", self._server.flops)

    def up(self, nbytes: int, messages: int) -> float:
        """Return the seconds of messages to the server."""
        own, server_side = self._device.up, self._server.down
        return self._over(nbytes, "device.up", _slower(own, server_side)) + messages * self._latency

    def down(self, nbytes: int, messages: int) -> float:
        """Return the seconds of messages to the client."""
        own, server_side = self._device.down, self._server.up
        return (
            self._over(nbytes, "device.down", _slower(own, server_side)) + messages * self._latency
        )

    @property
    def _latency(self) -> float:
        return self._device.latency + self._server.latency

    def _over(self, amount: int, name: str, rate: float | None) -> float:
        if not amount:
            return 0.0
        if rate is None:
            self._ignored[name] = None
            return 0.0
        return amount / rate


def overlapped(stages: Sequence[float], under_way: int) -> float:
    """Return the time of a step whose stages run at once, with M microbatches under way.

    max(stage) + (Σ stages − max(stage)) / M, the ideal of a pipeline [D]; `stages` are the seconds
    of a whole step.
    """
    longest = max(stages)
    return longest + (sum(stages) - longest) / under_way


def step_seconds(
    clock: Clock,
    operations: tuple[int, int],
    wire: WireBytes,
    cut: CutPoint | None,
    messages: int,
    under_way: int,
) -> float:
    """Return the seconds of an optimizer step; `operations` are those of client and server.

    The stages are the client's arithmetic, the way up, the server's arithmetic and the way down.
    A step ends with one more message and its answer, which nothing overlaps.
    """
    if cut is None:
        return clock.client(operations[0])
    stages = (
        clock.client(operations[0]),
        clock.up(wire.up, messages),
        clock.server(operations[1]),
        clock.down(wire.down, messages),
    )
    return overlapped(stages, under_way) + clock.up(0, 1) + clock.down(0, 1)


def _slower(first: float | None, second: float | None) -> float | None:
    given = [rate for rate in (first, second) if rate is not None]
    return min(given, default=None)
