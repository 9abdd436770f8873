"""The LoRA layer of one site, for all slots of a cohort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyrank.algebra import LowRank
from polyrank.errors import SiteError
from polyrank.model.dropout import keep_mask
from polyrank.model.routing import Routing


class CohortLayer:
    """The factors of K slots at one site and the hook that adds their updates to the output.

    `a` is K×r×n and `b` K×r×m, B transposed; both are leaves with gradients. `scales` are the s_k,
    `frozen` the terms without training, `drops` the dropout probability and seed per slot.
    """

    def __init__(
        self,
        site: str,
        a: Tensor,
        b: Tensor,
        scales: Sequence[float],
        frozen: Sequence[LowRank | None],
        drops: Sequence[tuple[float, int]],
    ):
        self.site = site
        self.routing: Routing | None = None
        self._a, self._b = a, b
        self._scales = list(scales)
        self._scale = torch.tensor(self._scales, dtype=a.dtype, device=a.device).view(-1, 1, 1)
        self._drops = list(drops)
        width = max((delta.rank for delta in frozen if delta is not None), default=0)
        slots, _, m, n = *a.shape[:2], b.shape[2], a.shape[2]
        self._frozen_a, self._frozen_b = a.new_zeros(slots, width, n), a.new_zeros(slots, width, m)
        for k, delta in enumerate(frozen):
            if delta is not None:
                self._frozen_a[k, : delta.rank] = delta.a
                self._frozen_b[k, : delta.rank] = delta.b.T

    @property
    def rank(self) -> int:
        """The largest rank of the slots."""
        return self._a.shape[1]

    @property
    def has_frozen(self) -> bool:
        """Whether some slot has a term that is active and not trained."""
        return self._frozen_a.shape[1] > 0

    @torch.no_grad()
    def load(self, k: int, delta: LowRank) -> None:
        """Set slot k's factors to those of s·BA given with s folded into B."""
        self._a[k, : delta.rank] = delta.a
        self._b[k, : delta.rank] = delta.b.T.to(self._b) / self._scales[k]

    def read(self, k: int, rank: int) -> LowRank:
        """Return a copy of slot k's first `rank` components, s folded into B."""
        b = self._b.detach()[k, :rank].T * self._scales[k]
        return LowRank(
            b.clone(memory_format=torch.contiguous_format), self._a.detach()[k, :rank].clone()
        )

    def hook(self, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return y + s_k B_k A_k dropout_k(x) + F_k x for the rows of every slot k."""
        x = args[0].to(self._a.dtype)
        if self.routing is None:
            if self._a.shape[0] > 1:
                raise SiteError(
                    f"Cohort: {self.site} was called before `route` said whose rows these are"
                )
            return self._unrouted(x, y)
        return self._routed(x, y, self.routing)

    def _unrouted(self, x: Tensor, y: Tensor) -> Tensor:
        """One slot, any shape."""
        xs, ys = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1]).to(x.dtype)
        if self.rank:
            ys = torch.baddbmm(ys, torch.bmm(xs, self._a.mT) * self._scale, self._b)
        if self.has_frozen:
            ys = torch.baddbmm(ys, torch.bmm(xs, self._frozen_a.mT), self._frozen_b)
        return ys.view(y.shape).to(y.dtype)

    def _routed(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        x = routing.rows_of(x, self.site)
        ys = routing.blocks(routing.rows_of(y, self.site)).to(x.dtype)
        if self.rank:
            a, b = routing.select(self._a), routing.select(self._b)
            hidden = torch.bmm(routing.blocks(self._dropped(x, routing)), a.mT)
            ys = torch.baddbmm(ys, hidden * routing.select(self._scale), b)
        if self.has_frozen:
            a, b = routing.select(self._frozen_a), routing.select(self._frozen_b)
            ys = torch.baddbmm(ys, torch.bmm(routing.blocks(x), a.mT), b)
        return routing.unblock(ys).view(y.shape).to(y.dtype)

    def _dropped(self, x: Tensor, routing: Routing) -> Tensor:
        """Return x with each part's mask applied; padding is beyond every mask and stays zero."""
        drops = [self._drops[part.slot] for part in routing.parts]
        if not any(p and part.draw for (p, _), part in zip(drops, routing.parts, strict=True)):
            return x
        mask = torch.zeros_like(x)
        first = 0
        for (p, seed), part in zip(drops, routing.parts, strict=True):
            block = mask[first : first + part.rows, : part.length]
            first += part.rows
            if p and part.draw:
                shape = (part.rows, part.length, x.shape[-1])
                block.copy_(keep_mask(seed, part.draw, self.site, shape, p, x))
            else:
                block.fill_(1.0)
        return x * mask
