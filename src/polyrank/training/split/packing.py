"""Rows of unequal length, packed without padding and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rows:
    """The rows of one batch: B of them, T the longest, P tokens in all.

    `index` holds, for each token of the packed rows, its place in the flattened B·T.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths, self.longest = list(lengths), max(lengths)
        columns = torch.arange(self.longest)
        there = columns < torch.tensor(self.lengths).view(-1, 1)
        self.index = there.flatten().nonzero()[:, 0].to(device)

    def packed(self, padded: Tensor) -> Tensor:
        """Return B×T×… as P×…, rows one after the other."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def padded(self, packed: Tensor) -> Tensor:
        """Return P×d as B×T×d, zeros where there is no token."""
        width = packed.shape[1]
        whole = packed.new_zeros(len(self.lengths) * self.longest, width)
        return whole.index_copy(0, self.index, packed).view(-1, self.longest, width)


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient that has reached a leaf, which forgets it; zeros if none has."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient
