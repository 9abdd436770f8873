"""The optimizer's side of a training: all of a client's numbers, or those that one end holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from polyrank.training.settings import LocalTraining


class ClientOptimizer:
    """Takes optimizer steps on parameters whose gradients others fill in.

    `steps` is how many there will be, for the schedule. The optimizer is made here and dropped with
    the learner.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], local: LocalTraining, steps: int):
        self._parameters, self._local, self._steps = list(parameters), local, steps
        self._start = (
            [p.detach().clone() for p in self._parameters] if local.resolved.proximal else []
        )
        self._optimizer = local.make_optimizer(self._parameters)

    def pull_back(self) -> None:
        """Add the gradient of FedProx's term, μ(θ − θ_start)."""
        if not self._start:
            return
        for parameter, start in zip(self._parameters, self._start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._local.resolved.proximal)

    def norm(self) -> Tensor:
        """Return the norm of the gradient, a scalar."""
        return get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def clip(self) -> Tensor:
        """Return the norm of the gradient, and scale the gradient down to the bound if above it."""
        if not self._local.clip:
            return self.norm()
        return clip_grad_norm_(self._parameters, self._local.clip)

    def scale(self, factor: float) -> None:
        """Multiply the gradient."""
        if factor != 1.0:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def step(self, index: int) -> None:
        """Take optimizer step `index`, counted from 0."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._local.rate(index, self._steps)
        self._optimizer.step()
