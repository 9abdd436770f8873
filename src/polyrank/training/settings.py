"""How a client trains: optimizer, length, batches, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from polyrank.errors import RecipeError
from polyrank.training.schedule import FACTORS

OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class LocalTraining:
    """The local training of one client in one round; made anew each round, moments included.

    Exactly one of `epochs` (also a fraction) and `steps` (optimizer steps) is given. An optimizer
    step takes `accumulation` microbatches of `batch` examples and the mean loss per target token
    over all of them. `clip` bounds the norm of the gradient (None: no bound), `warmup` is the
    fraction of the steps with a rising rate, `dropout` acts on the inputs of LoRA. `betas` and
    `eps` are AdamW's, `momentum` is SGD's.

    `proximal` μ adds FedProx's term μ/2·‖θ − θ_start‖² to the loss, over all that is trained: the
    factors as trained, with LoRA's scale divided out, or the values of a sparse update (arXiv
    1812.06127 [P], eq. 2; on LoRA's factors [I]). Its gradient is added before clipping, and
    reported losses are without it. Plain SGD needs lr·μ < 2, or it runs away from the start.

    Raises RecipeError, naming the field, for a value that cannot be meant.
    """

    optimizer: OptimizerName = "adamw"
    lr: float = 3e-4
    epochs: float | None = 1
    steps: int | None = None
    batch: int = 8
    accumulation: int = 1
    clip: float | None = 1.0
    warmup: float = 0.0
    schedule: ScheduleName = "constant"
    weight_decay: float = 0.0
    dropout: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    proximal: float = field(default=0.0, metadata={"later": True})

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise RecipeError(
                f"local: expected exactly one of epochs and steps, got epochs={self.epochs} and "
                f"steps={self.steps}; set the other to None"
            )
        _member("optimizer", self.optimizer, _OPTIMIZERS)
        _member("schedule", self.schedule, FACTORS)
        _above_zero("lr", self.lr)
        _above_zero("epochs", self.epochs)
        _above_zero("clip", self.clip)
        _above_zero("eps", self.eps)
        _count("steps", self.steps)
        _count("batch", self.batch)
        _count("accumulation", self.accumulation)
        for name, value in (("weight_decay", self.weight_decay), ("proximal", self.proximal)):
            if not (math.isfinite(value) and value >= 0):
                raise RecipeError(f"local.{name}: expected 0 or more, got {value}")
        for name, value in (
            ("warmup", self.warmup),
            ("dropout", self.dropout),
            ("momentum", self.momentum),
            ("betas[0]", self.betas[0]),
            ("betas[1]", self.betas[1]),
        ):
            if not 0.0 <= value < 1.0:
                raise RecipeError(f"local.{name}: expected a number in [0, 1), got {value}")

    def steps_for(self, examples: int) -> int:
        """Return the optimizer steps that a client with so many examples takes.

        An epoch ends with a shorter microbatch and a shorter group where they do not divide, and a
        fraction of an epoch is rounded up to whole steps, as the Hugging Face Trainer does it.
        """
        if self.epochs is None:
            return self.steps or 0
        return math.ceil(self.epochs * self.steps_per_epoch(examples))

    def steps_per_epoch(self, examples: int) -> int:
        """Return the optimizer steps of one pass over so many examples."""
        return math.ceil(math.ceil(examples / self.batch) / self.accumulation)

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (from 0) of so many."""
        warm = int(self.warmup * steps)
        if step < warm:
            return self.lr * step / warm
        return self.lr * FACTORS[self.schedule]((step - warm) / max(1, steps - warm))

    @property
    def moments(self) -> int:
        """Return how many values the optimizer keeps per parameter."""
        return _MOMENTS[self.optimizer](self)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return a fresh optimizer of these parameters."""
        return _OPTIMIZERS[self.optimizer](self, parameters)


def _adamw(local: LocalTraining, parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=local.lr,
        betas=local.betas,
        eps=local.eps,
        weight_decay=local.weight_decay,
    )


def _sgd(local: LocalTraining, parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(
        parameters, lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
    )


_OPTIMIZERS: dict[str, Callable[[LocalTraining, list[nn.Parameter]], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}

_MOMENTS: dict[str, Callable[[LocalTraining], int]] = {
    "adamw": lambda _: 2,
    "sgd": lambda local: int(local.momentum > 0),
}


def _member(name: str, value: str, known: dict[str, object] | dict[str, Callable]) -> None:
    if value not in known:
        raise RecipeError(f"local.{name}: expected one of {sorted(known)}, got {value!r}")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise RecipeError(f"local.{name}: expected a finite number above 0, got {value}")


def _count(name: str, value: int | None) -> None:
    if value is not None and (value != int(value) or value < 1):
        raise RecipeError(f"local.{name}: expected a whole number of at least 1, got {value}")
