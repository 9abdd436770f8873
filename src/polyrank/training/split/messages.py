"""The messages between a split client and the server that holds the rest of its model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, order=True)
class RequestId:
    """A request's client, round, attempt, optimizer step and microbatch; all count from 0."""

    client: str
    round: int
    attempt: int
    step: int
    micro: int = 0

    def __str__(self) -> str:
        return (
            f"client {self.client!r}, round {self.round}, attempt {self.attempt}, step "
            f"{self.step}, microbatch {self.micro}"
        )


@dataclass(frozen=True, eq=False)
class Activations:
    """The client's activations of a microbatch at the lower cut, without padding.

    `lengths` are the tokens per row, P in all; `states` P×d, row after row. `labels` (int64, P) are
    the tokens to be predicted at these positions, −100 where there is no loss; None in a U-shape,
    where they stay at the client. `weight` times the summed loss is what this microbatch adds to
    the mean loss of its step: one over the step's target tokens. `last` marks the step's last
    microbatch.
    """

    id: RequestId
    last: bool
    weight: float
    lengths: tuple[int, ...]
    states: Tensor
    labels: Tensor | None


@dataclass(frozen=True, eq=False)
class Gradients:
    """U-shape, the way back: the gradient of the step's mean loss at the upper cut, P×d."""

    id: RequestId
    last: bool
    states: Tensor


@dataclass(frozen=True)
class Step:
    """Both ends take their optimizer step now, gradients times `factor`, the common clip factor."""

    id: RequestId
    factor: float


@dataclass(frozen=True, eq=False)
class Returned:
    """The reply to `Activations` and `Gradients`: P×d.

    The gradient of the step's mean loss at the lower cut, or, to the activations of a U-shape, what
    enters the block at the upper cut. `loss` is the summed loss of the microbatch, where the server
    computes it. `squared_norm` is that of the server part's gradient over the whole step, before
    clipping, in the last reply before `Step`; None before, and where clients share one adapter,
    which the server clips by its own norm.
    """

    id: RequestId
    states: Tensor
    loss: float | None = None
    squared_norm: float | None = None


@dataclass(frozen=True)
class Stepped:
    """The reply to `Step`: the server has taken the step."""

    id: RequestId


@dataclass(frozen=True)
class Refused:
    """The reply to a request that cannot be served, and why; nothing of it was applied."""

    id: RequestId
    reason: str


Request = Activations | Gradients | Step
Reply = Returned | Stepped | Refused
