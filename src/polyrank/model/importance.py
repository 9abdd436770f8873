"""Important weights: how much of the loss's change each adapted matrix carries.

At a site y = Wx, and for the gradient G of the loss with respect to W (never computed),

    Σ_j W_kj G_kj = Σ_tokens y_k ∂L/∂y_k    per output channel k,

so the site's own output and the gradient that arrives at it give the products of weights and
gradients for the price of one elementwise product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyrank.errors import SiteError
from polyrank.model.routing import Routing
from polyrank.planning.importance import METRICS


class Meter:
    """The sums c_k of K slots at all sites, over the passes since they were last set to zero.

    float32, or float64 on a float64 base. Several backward passes add up, and one that computes a
    block again (activation checkpointing) counts once: what a site gave is saved by autograd like
    any other tensor, and summed when its gradient arrives.
    """

    def __init__(
        self, slots: int, modules: Mapping[str, nn.Module], heights: Mapping[str, int], like: Tensor
    ):
        self._biases = {site: getattr(module, "bias", None) for site, module in modules.items()}
        self._heights = dict(heights)
        self._sums = like.new_zeros(slots, sum(heights.values()))
        blocks = self._sums.split(list(heights.values()), dim=1)
        self._of_site = dict(zip(heights, blocks, strict=True))

    def tap(self, site: str, y: Tensor, routing: Routing) -> Tensor:
        """Return y, the site's own output with its bias, so that its gradient will be summed.

        SiteError if y does not hold exactly the batch.
        """
        routing.rows_of(y, site)
        return _Tap.apply(y, self._biases[site], self._of_site[site], routing)

    def sums(self) -> Tensor:
        """Return the sums of all slots, one row each, as they are kept."""
        return self._sums

    def zero(self, slots: Sequence[int] | None) -> None:
        """Set the sums of these slots to zero; None: of all."""
        if slots is None:
            self._sums.zero_()
        for k in slots or ():
            self._sums[k].zero_()

    def scores(self, k: int, metric: str) -> dict[str, float]:
        """Return the score of slot k at every site."""
        parts = self._sums[k].split(list(self._heights.values()))
        values = torch.stack([METRICS[metric](part) for part in parts]).tolist()
        return dict(zip(self._heights, values, strict=True))


def check_metric(place: str, metric: str) -> None:
    """Raise SiteError, beginning with `place`, unless there is such a metric."""
    if metric not in METRICS:
        raise SiteError(f"{place}: expected a metric of {list(METRICS)}, got {metric!r}")


class _Tap(torch.autograd.Function):
    """The identity; on the way back it adds the sums of (y − bias)·∂L/∂y to their slots'."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, sums: Tensor, routing: Routing) -> Tensor:
        ctx.save_for_backward(y)
        ctx.bias, ctx.sums, ctx.routing = bias, sums, routing
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        own = y.to(ctx.sums.dtype)
        if ctx.bias is not None:
            own = own - ctx.bias
        slots, sums = ctx.routing.scored_sums(own * gradient)
        ctx.sums.index_add_(0, slots, sums)
        return gradient, None, None, None
