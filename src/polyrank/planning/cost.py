"""What training costs: memory, operations, bytes and time, from a model's anatomy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from polyrank.planning.anatomy import Anatomy
from polyrank.planning.spec import ModelSpec
from polyrank.planning.split import Split
from polyrank.planning.workload import Workload


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
class Memory:
    """Bytes on one machine at the peak of an optimizer step."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one optimizer step on each side; a multiply-add is two.

    `attention` is what of both is spent in the products of queries, keys and values.
    """

    client: int
    server: int
    attention: int = 0


@dataclass(frozen=True)
class Wire:
    """Bytes from the client to the server and back."""

    up: int
    down: int


@dataclass(frozen=True)
class Seconds:
    """Time of one optimizer step and of one round.

    `ignored` names the figures that were not given and that therefore take no time.
    """

    step: float
    round: float
    ignored: tuple[str, ...] = ()


class CostModel:
    """Costs of training clients of one model under one workload."""

    def __init__(self, anatomy: Anatomy, spec: ModelSpec, workload: Workload):
        self.anatomy, self.spec, self.workload = anatomy, spec, workload

    def memory(self, ranks: Mapping[str, int], cut: Split | None) -> Memory:
        """Return the bytes at the client."""
        raise NotImplementedError

    def server_memory(self, ranks: Mapping[str, int], cut: Split | None) -> Memory:
        """Return the bytes that a client's tail takes at the server, without the base's weights."""
        raise NotImplementedError

    def operations(self, ranks: Mapping[str, int], cut: Split | None) -> Operations:
        """Return the operations of an optimizer step."""
        raise NotImplementedError

    def wire(self, cut: Split | None) -> Wire:
        """Return the bytes of an optimizer step on the link; none for a whole client."""
        raise NotImplementedError

    def adapter_bytes(self, ranks: Mapping[str, int], cut: Split | None) -> Wire:
        """Return the bytes of a round's factors of the client's sites."""
        raise NotImplementedError

    def seconds(
        self,
        ranks: Mapping[str, int],
        cut: Split | None,
        device: Machine,
        server: Machine,
        steps: int,
    ) -> Seconds:
        """Return the time of a step and of a round of so many steps."""
        raise NotImplementedError
