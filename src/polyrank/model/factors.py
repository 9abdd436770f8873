"""The trained factors of low-rank slots at one site: K pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyrank.algebra import Delta, LowRank
from polyrank.model.dropout import keep_mask
from polyrank.model.routing import Routing


class Factors:
    """The factors of K slots at one site: y += s_k B_k A_k dropout_k(x).

    `a` is K×r×n and `b` K×r×m, B transposed; `gradients` are those of both. `scales` are the s_k,
    `drops` the dropout probability and seed per slot.
    """

    def __init__(
        self,
        site: str,
        a: Tensor,
        b: Tensor,
        gradients: tuple[Tensor, Tensor],
        scales: Sequence[float],
        drops: Sequence[tuple[float, int]],
    ):
        self._site, self._a, self._b, self._gradients = site, a, b, gradients
        self._scales = list(scales)
        self._scale = torch.tensor(self._scales, dtype=a.dtype, device=a.device).view(-1, 1, 1)
        self._drops = list(drops)

    @property
    def width(self) -> int:
        """The largest rank of the slots."""
        return self._a.shape[1]

    @torch.no_grad()
    def load(self, k: int, delta: Delta) -> None:
        """Set slot k's factors to those of s·BA given with s folded into B."""
        if isinstance(delta, LowRank):
            self._a[k, : delta.rank] = delta.a
            self._b[k, : delta.rank] = delta.b.T.to(self._b) / self._scales[k]

    def read(self, k: int, start: Delta) -> LowRank:
        """Return a copy of slot k's factors at the rank of its start, s folded into B."""
        b = self._b.detach()[k, : start.rank].T * self._scales[k]
        a = self._a.detach()[k, : start.rank]
        return LowRank(b.clone(memory_format=torch.contiguous_format), a.clone())

    def inputs(self, x: Tensor, routing: Routing) -> Tensor:
        """Return x with each part's mask applied; padding is beyond every mask and stays zero."""
        drops = [self._drops[part.slot] for part in routing.parts]
        if not any(p and part.draw for (p, _), part in zip(drops, routing.parts, strict=True)):
            return x
        mask = torch.zeros_like(x)
        first = 0
        for (p, seed), part in zip(drops, routing.parts, strict=True):
            for share in part.shared(seed):
                block = mask[first : first + share.rows, : share.length]
                first += share.rows
                if p and part.draw:
                    shape = (share.rows, share.length, x.shape[-1])
                    block.copy_(keep_mask(share.seed, part.draw, self._site, shape, p, x))
                else:
                    block.fill_(1.0)
        return x * mask

    def added(self, ys: Tensor, xs: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Return blocks ys with the updates of their slots' xs added."""
        hidden = torch.bmm(xs, select(self._a).mT)
        return torch.baddbmm(ys, hidden * select(self._scale), select(self._b))

    @torch.no_grad()
    def penalise(self, strengths: Tensor, keeps: Tensor) -> None:
        """Add the gradients of λ_k ‖B_k[:, keep_k:]‖_F ‖A_k[keep_k:]‖_F to both factors of slot k.

        `strengths` and `keeps` are [K]. Where a norm is zero its own gradient is taken as zero.
        """
        rows = torch.arange(self.width, device=self._a.device)
        tail = (rows >= keeps.view(-1, 1)).to(self._a.dtype).unsqueeze(2)
        a, b = self._a * tail, self._b * tail
        length_a, length_b = (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (a, b))
        pull = strengths.view(-1, 1, 1)
        self._gradients[0].add_(pull * length_b * _unit(a, length_a))
        self._gradients[1].add_(pull * length_a * _unit(b, length_b))


def _unit(x: Tensor, length: Tensor) -> Tensor:
    """x/‖x‖, and zero for x = 0."""
    return torch.where(length > 0, x / length, 0.0)
