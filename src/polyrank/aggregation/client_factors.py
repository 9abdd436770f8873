"""The factors that a client starts from: LoRA's random A, or its own of an earlier round.

State, under rules that let clients go on with their own: ``site/kept/CLIENT/b`` m×r and
``site/kept/CLIENT/a`` r×n, as the client returned them last, every s folded into B, in float32 or
wider. They are looked up and never listed, so that a client may have any name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polyrank import seeds
from polyrank.aggregation.types import State
from polyrank.algebra import LowRank
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def initial_rows(n: int, rank: int, *, seed: int, site: str) -> Tensor:
    """Return a rank×n float64 matrix with entries from U(−1/√n, 1/√n), LoRA's initial A.

    Row j depends on seed, site and j alone, not on `rank`, so that all ranks share their rows. The
    distribution is that of peft (Kaiming uniform with a = √5).
    """
    draw = seeds.generator(seed, site, "fresh rows")
    return (torch.rand(rank, n, generator=draw, dtype=torch.float64) * 2 - 1) / math.sqrt(n)


def own_factors(state: State, site: str, client: str) -> LowRank | None:
    """Return what the client returned last at a site; None if it never did."""
    b, a = (state.tensors.get(name) for name in _names(site, client))
    return None if b is None or a is None else LowRank(b, a)


def own_tensors(site: str, client: str, factors: LowRank) -> dict[str, Tensor]:
    """Return the tensors of the state that keep these factors, in memory of their own."""
    dtype = torch.promote_types(factors.b.dtype, torch.float32)
    copies = (tensor.to(dtype, copy=True).contiguous() for tensor in (factors.b, factors.a))
    return dict(zip(_names(site, client), copies, strict=True))


def at_rank(factors: LowRank, rank: int, *, seed: int, site: str) -> LowRank:
    """Return the factors at another rank: a prefix, or zero columns of B and random rows of A.

    More ranks leave the product as it is, fewer take what lay behind them away.
    """
    more = rank - factors.rank
    if more <= 0:
        return factors.prefix(rank)
    m, n = factors.shape
    rows = initial_rows(n, rank, seed=seed, site=site)[factors.rank :].to(factors.a)
    return LowRank(
        torch.cat([factors.b, factors.b.new_zeros(m, more)], dim=1), torch.cat([factors.a, rows])
    )


def _names(site: str, client: str) -> tuple[str, str]:
    return f"{site}/kept/{client}/b", f"{site}/kept/{client}/a"
