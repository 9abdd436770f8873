"""The trained matrices of dense slots at one site: K whole ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyrank.algebra import Delta, Dense, LowRank
from polyrank.model.routing import Routing


class Whole:
    """The matrices of K slots at one site: y += D_k x, every entry of D_k m×n trained.

    `values` is K×m×n, or K×0×n where no slot trains this site. A slot that trains nothing here,
    while another does, has a matrix of zeros whose gradient is exactly zero. There is no scale and
    no dropout.
    """

    def __init__(self, values: Tensor, starts: Sequence[Delta]):
        self._values, self._shape = values, starts[0].shape
        trains = [isinstance(start, Dense) for start in starts]
        flags = torch.tensor(trains, dtype=values.dtype, device=values.device).view(-1, 1, 1)
        self._held = None if all(trains) else flags

    @property
    def width(self) -> int:
        """The rows of the matrices; 0 where no slot trains this site."""
        return self._values.shape[1]

    @torch.no_grad()
    def load(self, k: int, delta: Delta) -> None:
        """Set slot k's matrix."""
        if isinstance(delta, Dense):
            self._values[k] = delta.matrix

    def read(self, k: int, start: Delta) -> Delta:
        """Return a copy of slot k's matrix."""
        if not isinstance(start, Dense):
            like = self._values
            return LowRank.zero(*self._shape, dtype=like.dtype, device=like.device)
        return Dense(self._values.detach()[k].clone())

    def inputs(self, x: Tensor, _: Routing) -> Tensor:
        """Return x: dense training drops nothing out."""
        return x

    def added(self, ys: Tensor, xs: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Return blocks ys with the updates of their slots' xs added."""
        values = self._values if self._held is None else self._values * self._held
        return torch.baddbmm(ys, xs, select(values).mT)

    def penalise(self, strengths: Tensor, keeps: Tensor) -> None:
        """Do nothing: a penalty is of factors."""
