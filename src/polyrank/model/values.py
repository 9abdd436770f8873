"""The trained values of sparse slots at one site: K vectors at given positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyrank.algebra import Delta, LowRank, Sparse
from polyrank.model.routing import Routing


class Values:
    """The values of K slots at one site: y += S_k x, S_k m×n with slot k's values at its positions.

    `values` is K×p, p the most values that a slot has here; shorter ones are filled up at a dummy
    position m·n behind the matrix, where gradients are exactly zero. There is no scale and no
    dropout. The matrices S_k are made for the product and made again in the backward pass, so that
    K·m·n numbers are held for one site at a time and not for all of them; the backward pass takes
    as much again for their gradients.
    """

    def __init__(self, values: Tensor, starts: Sequence[Delta]):
        self._values, self._shape = values, starts[0].shape
        m, n = self._shape
        self._positions = torch.full_like(values, m * n, dtype=torch.int64)
        for k, start in enumerate(starts):
            if isinstance(start, Sparse):
                self._positions[k, : len(start.positions)] = start.positions

    @property
    def width(self) -> int:
        """The largest number of values of the slots."""
        return self._values.shape[1]

    @torch.no_grad()
    def load(self, k: int, delta: Delta) -> None:
        """Set slot k's values."""
        if isinstance(delta, Sparse):
            self._values[k, : len(delta.values)] = delta.values

    def read(self, k: int, start: Delta) -> Delta:
        """Return a copy of slot k's values, at the start's own positions."""
        if not isinstance(start, Sparse):
            like = self._values
            return LowRank.zero(*self._shape, dtype=like.dtype, device=like.device)
        values = self._values.detach()[k, : len(start.values)].clone()
        return Sparse(values, start.positions, start.shape)

    def inputs(self, x: Tensor, _: Routing) -> Tensor:
        """Return x: sparse training drops nothing out."""
        return x

    def added(self, ys: Tensor, xs: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Return blocks ys with the updates of their slots' xs added."""
        values, positions = select(self._values), select(self._positions)
        product: Tensor = _ScatteredProduct.apply(xs, values, positions, self._shape)
        return ys + product

    def penalise(self, strengths: Tensor, keeps: Tensor) -> None:
        """Do nothing: a penalty is of factors."""


class _ScatteredProduct(torch.autograd.Function):
    """X_k S_kᵀ for blocks X_k t×n; saved are the inputs alone, not the matrices S_k."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, positions: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, values, positions)
        ctx.shape = shape
        return torch.bmm(x, _scattered(values, positions, shape).mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, positions = ctx.saved_tensors
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(gradient, _scattered(values, positions, ctx.shape))
        if ctx.needs_input_grad[1]:
            last = ctx.shape[0] * ctx.shape[1] - 1
            whole = torch.bmm(gradient.mT, x).flatten(1)
            of_values = whole.gather(1, positions.clamp(max=last))
            of_values.masked_fill_(positions > last, 0.0)
        return of_x, of_values, None, None


def _scattered(values: Tensor, positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the matrices S_k, K×m×n."""
    m, n = shape
    flat = values.new_zeros(len(values), m * n + 1)
    return flat.scatter_(1, positions, values)[:, :-1].unflatten(1, (m, n))
