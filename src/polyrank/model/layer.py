"""The layer of one site, for all slots of a cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from polyrank.algebra import Delta, LowRank
from polyrank.errors import SiteError
from polyrank.model.importance import Meter
from polyrank.model.routing import Routing


class Trained(Protocol):
    """What K slots train at one site; `width` is 0 where they train nothing."""

    @property
    def width(self) -> int:
        """The size that the slots are filled up to."""
        ...

    def load(self, k: int, delta: Delta) -> None:
        """Set what slot k trains."""
        ...

    def read(self, k: int, start: Delta) -> Delta:
        """Return a copy of what slot k has trained, of the kind and size of its start."""
        ...

    def inputs(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the inputs that training sees, of a routed batch."""
        ...

    def added(self, ys: Tensor, xs: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Return blocks ys with the updates of their slots' xs added."""
        ...

    def penalise(self, strengths: Tensor, keeps: Tensor) -> None:
        """Add the gradients of the slots' penalties."""
        ...


class CohortLayer:
    """What acts at one site, and the hook that adds it to the output.

    `trained` is what the slots train, `frozen` their terms without training, `merged` an m×n matrix
    for all slots alike (None: there is none, or it is in the weight already). Nothing acts while it
    is `resting`. With a `meter`, passes that are scored add to its sums; what is scored is the
    module's own output, with what is merged: the weight in use, whichever way M is added to it.
    """

    def __init__(
        self,
        site: str,
        trained: Trained,
        frozen: Sequence[LowRank | None],
        merged: Tensor | None,
        like: Tensor,
        shape: tuple[int, int],
        meter: Meter | None = None,
    ):
        self.site = site
        self.trained = trained
        self.routing: Routing | None = None
        self.resting = False
        self._merged, self._dtype, self._meter = merged, like.dtype, meter
        width = max((delta.rank for delta in frozen if delta is not None), default=0)
        m, n = shape
        self._frozen_a = like.new_zeros(len(frozen), width, n)
        self._frozen_b = like.new_zeros(len(frozen), width, m)
        for k, delta in enumerate(frozen):
            if delta is not None:
                self._frozen_a[k, : delta.rank] = delta.a
                self._frozen_b[k, : delta.rank] = delta.b.T

    @property
    def has_frozen(self) -> bool:
        """Whether some slot has a term that is active and not trained."""
        return self._frozen_a.shape[1] > 0

    @property
    def by_slot(self) -> bool:
        """Whether what acts here depends on the slot."""
        return self.trained.width > 0 or self.has_frozen

    @property
    def acts(self) -> bool:
        """Whether the hook changes an output."""
        return self.by_slot or self._merged is not None

    def hook(self, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return y with what is merged, trained and frozen added, rounded to y's dtype once."""
        if self.resting:
            return y
        routing = self.routing
        if not self.acts:
            own = self._metered(y, routing)
            return y if own is y else own.clone()  # The model may write to what it gets.
        x = args[0].to(self._dtype)
        own = y
        if self._merged is not None:
            own = y.to(x.dtype) + nn.functional.linear(x, self._merged)
        out = self._metered(own, routing).to(x.dtype)
        if self.by_slot:
            out = self._unrouted(x, out) if routing is None else self._routed(x, out, routing)
        return out.to(y.dtype)

    def _metered(self, own: Tensor, routing: Routing | None) -> Tensor:
        if self._meter is None or routing is None or not routing.scored:
            return own
        return self._meter.tap(self.site, own, routing)

    def _unrouted(self, x: Tensor, y: Tensor) -> Tensor:
        """One slot, any shape."""
        if self._frozen_a.shape[0] > 1:
            raise SiteError(
                f"Cohort: {self.site} was called before `route` said whose rows these are"
            )
        xs, ys = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
        if self.trained.width:
            ys = self.trained.added(ys, xs, lambda stack: stack)
        return self._with_frozen(ys, xs, lambda stack: stack).view(y.shape)

    def _routed(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        x = routing.rows_of(x, self.site)
        ys = routing.blocks(routing.rows_of(y, self.site))
        if self.trained.width:
            inputs = routing.blocks(self.trained.inputs(x, routing))
            ys = self.trained.added(ys, inputs, routing.select)
        if self.has_frozen:
            ys = self._with_frozen(ys, routing.blocks(x), routing.select)
        return routing.unblock(ys).view(y.shape)

    def _with_frozen(self, ys: Tensor, xs: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.has_frozen:
            return ys
        hidden = torch.bmm(xs, select(self._frozen_a).mT)
        return torch.baddbmm(ys, hidden, select(self._frozen_b))
