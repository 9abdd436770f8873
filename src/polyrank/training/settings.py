"""Settings of a client's training: method, optimizer, length, batches, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval

from polyrank.errors import RecipeError
from polyrank.lazy_torch import torch
from polyrank.settings import Expected, OneOf, check, stored
from polyrank.training.methods import METHODS, LocalSettings, local_method
from polyrank.training.schedule import FACTORS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Fraction = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class Kind:
    """A kind of optimizer: `moments` values are kept per parameter, `make` makes one."""

    make: Callable[[LocalTraining, list[nn.Parameter]], Optimizer]
    moments: Callable[[LocalTraining], int]


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


OPTIMIZERS: Mapping[str, Kind] = {
    "adamw": Kind(_adamw, lambda _: 2),
    "sgd": Kind(_sgd, lambda local: int(local.momentum > 0)),
}


@dataclass(frozen=True)
class LocalTraining:
    """A client's training in one round; its optimizer is made anew each time."""

    method: Annotated[str, OneOf(METHODS)] | None = None
    """A paper's name for a set of the next three keys: `fedavg` (SGD), `fedit` (AdamW), `fedprox`
    (`proximal` 0.01), `slora` (`sparse_rounds` 5)."""
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] | None = None
    """The optimizer; left out, the method's, or `adamw`."""
    proximal: Annotated[float, Ge(0)] | None = None
    """FedProx's μ: strength of the pull to where the round began; left out, the method's, or 0."""
    sparse_rounds: Annotated[int, Ge(0)] | None = None
    """SLoRA's first rounds, in which some entries of the matrices are trained instead of factors;
    left out, the method's, or 0."""
    lr: Annotated[float, Gt(0)] = 3e-4
    """Learning rate."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the client's data in a round, also a fraction; 1 if `steps` is not given."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps in a round, instead of `epochs`."""
    batch: Annotated[int, Ge(1)] = 8
    """Examples in a microbatch."""
    accumulation: Annotated[int, Ge(1)] = 1
    """Microbatches in an optimizer step. Its loss is the mean per target token over all of them."""
    clip: Annotated[float, Ge(0)] = 1.0
    """Bound on the norm of a client's gradient; 0: none."""
    warmup: Fraction = 0.0
    """Fraction of the steps with a rising rate."""
    schedule: Annotated[str, OneOf(FACTORS)] = "constant"
    """How the rate falls within a round."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay of the factors."""
    dropout: Fraction = 0.0
    """Dropout on the inputs of LoRA."""
    betas: Annotated[tuple[Fraction, Fraction], Expected("a list of two numbers")] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's term in the denominator."""
    momentum: Fraction = 0.0
    """Momentum of SGD."""

    def __post_init__(self) -> None:
        check(self, "local")
        if self.epochs is not None and self.steps is not None:
            raise RecipeError("local: give epochs or steps, not both")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"local.betas: expected two numbers in [0, 1), got {self.betas}")
        self.resolved  # noqa: B018  # Raises if the method and its keys contradict each other.

    @property
    def resolved(self) -> LocalSettings:
        """What the method, or its keys alone, come to.

        FedProx adds μ/2·‖θ − θ_start‖² to the loss, over all that is trained: the factors as
        trained, with LoRA's scale divided out, or the values of a sparse update (arXiv 1812.06127
        [P], eq. 2; on LoRA's factors [I]). Its gradient is added before clipping, and reported
        losses are without it. Plain SGD needs lr·μ < 2, or it runs away from the start.
        """
        keys = {
            "optimizer": self.optimizer,
            "proximal": self.proximal,
            "sparse_rounds": self.sparse_rounds,
        }
        given: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
        return (
            local_method(self.method).settings(**given) if self.method else LocalSettings(**given)
        )

    @property
    def passes(self) -> float | None:
        """Passes over the client's data in a round; None if `steps` are given."""
        return (self.epochs or 1) if self.steps is None else None

    def steps_for(self, examples: int) -> int:
        """Return the optimizer steps that a client with so many examples takes.

        An epoch ends with a shorter microbatch and a shorter group where they do not divide, and a
        fraction of an epoch is rounded up to whole steps, as the Hugging Face Trainer does it.
        """
        if self.steps is not None:
            return self.steps
        return math.ceil((self.epochs or 1) * self.steps_per_epoch(examples))

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
        return OPTIMIZERS[self.resolved.optimizer].moments(self)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return a fresh optimizer of these parameters."""
        return OPTIMIZERS[self.resolved.optimizer].make(self, parameters)

    def described(self) -> dict[str, Any]:
        """Return what a client's update depends on, as run folders have it."""
        description = stored(self)
        del description["method"], description["sparse_rounds"], description["proximal"]
        if self.resolved.proximal:
            description["proximal"] = self.resolved.proximal
        changed = {"optimizer": self.resolved.optimizer, "epochs": self.passes}
        return {**description, **changed, "clip": self.clip or None}
