"""The numbers that the slots of a cohort train: one row per slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SlotStorage:
    """K rows of trained numbers and K rows of gradients; leaves of autograd are views of columns.

    So an optimizer made of a row's parameters trains one slot and no other.
    """

    def __init__(self, slots: int, size: int, dtype: torch.dtype, device: torch.device):
        self._values = torch.zeros(slots, size, dtype=dtype, device=device)
        self._gradients = torch.zeros_like(self._values)

    def leaf(self, start: int, *shape: int, trained: bool = True) -> Tensor:
        """Return a K×shape leaf over the columns from `start` on.

        What it gains in a backward pass is added to the gradients, and nothing where it is not
        `trained`.
        """
        columns = self._columns(start, *shape)
        leaf = self._values[:, columns].view(len(self._values), *shape).detach()
        if not trained:
            return leaf
        leaf.requires_grad_()
        gradient = self.gradient(start, *shape)

        def collect(leaf: Tensor) -> None:
            if leaf.grad is not None:
                gradient.add_(leaf.grad)
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(collect)
        return leaf

    def gradient(self, start: int, *shape: int) -> Tensor:
        """Return the gradients of such a leaf, K×shape, as a view."""
        return self._gradients[:, self._columns(start, *shape)].view(len(self._values), *shape)

    def parameter(self, k: int, columns: slice) -> nn.Parameter:
        """Return columns of slot k's row as one flat parameter with its gradient, both views.

        Autograd does not see an optimizer change it: a slot may take its step while the backward
        pass of other slots, over the same batch, is yet to be made.
        """
        parameter = nn.Parameter(self._values.data[k, columns])
        parameter.grad = self._gradients[k, columns]
        return parameter

    def zero_gradients(self, slots: Sequence[int] | None = None) -> None:
        """Set the gradients of these slots to zero, in place; None: of all."""
        for gradients in (
            [self._gradients] if slots is None else [self._gradients[k] for k in slots]
        ):
            gradients.zero_()

    def _columns(self, start: int, *shape: int) -> slice:
        return slice(start, start + torch.Size(shape).numel())
