"""Rows of unequal length, packed without padding and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PackedRows:
    """The lengths of a batch's B rows, of which T is the longest and P the sum.

    `index` (P) is the position of each packed token in the flattened B·T.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths, self.longest = list(lengths), max(lengths)
        columns = torch.arange(self.longest)
        is_token = columns < torch.tensor(self.lengths).view(-1, 1)
        self.index = is_token.flatten().nonzero()[:, 0].to(device)

    def packed(self, padded: Tensor) -> Tensor:
        """Return B×T×… as P×…, rows one after the other."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def padded(self, packed: Tensor) -> Tensor:
        """Return P×d as B×T×d, zeros where there is no token."""
        width = packed.shape[1]
        whole = packed.new_zeros(len(self.lengths) * self.longest, width)
        return whole.index_copy(0, self.index, packed).view(-1, self.longest, width)


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient of a leaf and clear it; zeros if the leaf has none."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient
