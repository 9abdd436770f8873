"""Fresh directions: the random rows of A that a LoRA adapter starts from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polyrank import seeds
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def fresh_rows(n: int, rank: int, *, seed: int, site: str) -> Tensor:
    """Return a rank×n float64 matrix with entries from U(−1/√n, 1/√n), LoRA's initial A.

    Row j depends on seed, site and j alone, not on `rank`: whoever asks gets the same row. The
    distribution is that of peft (Kaiming uniform with a = √5).
    """
    draw = seeds.generator(seed, site, "fresh rows")
    return (torch.rand(rank, n, generator=draw, dtype=torch.float64) * 2 - 1) / math.sqrt(n)
