"""A truncated singular value decomposition and what it left out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyrank.algebra.lowrank import LowRank
from polyrank.errors import RankError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factorisation:
    """The best approximation D ≈ u·diag(s)·vᵀ of rank k, singular values descending.

    `u` is m×k and `v` n×k with orthonormal columns, `s` is [k] and positive: directions that the
    arithmetic cannot tell from zero are left out, so k may be below the rank asked for, and is 0
    for D = 0. The largest entry of each column of `u` is positive (the first of equals).
    `energy` is ‖D‖_F², `discarded` is ‖D − u s vᵀ‖_F², `method` names the algorithm that ran.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    energy: float
    discarded: float
    method: str

    @property
    def rank(self) -> int:
        """The number k of directions kept."""
        return self.s.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that was factored."""
        return self.u.shape[0], self.v.shape[0]

    def lowrank(self, rank: int | None = None) -> LowRank:
        """Return the product as B = u·diag(s), A = vᵀ at `rank` (default k), filled up with zeros.

        Raises RankError if `rank` is negative.
        """
        wanted = self.rank if rank is None else rank
        if wanted < 0:
            raise RankError(f"Factorisation.lowrank: expected a rank of 0 or more, got {rank}")
        padded = self.padded(max(wanted, self.rank))
        return LowRank(padded.u * padded.s, padded.v.T).prefix(wanted)

    def padded(self, rank: int) -> Factorisation:
        """Return the same product with zero directions added up to `rank` (k or more)."""
        extra = rank - self.rank
        if extra < 0:
            raise RankError(f"Factorisation.padded: {rank} is below the rank {self.rank}")
        u, s, v = (torch.nn.functional.pad(x, (0, extra)) for x in (self.u, self.s, self.v))
        return replace(self, u=u, s=s, v=v)

    def truncated(self, rank: int) -> Factorisation:
        """Return the best approximation at `rank`, the same if it has no more directions."""
        if not 0 <= rank < self.rank:
            return self
        lost = float(self.s[rank:].double().square().sum())
        return replace(
            self,
            u=self.u[:, :rank],
            s=self.s[:rank],
            v=self.v[:, :rank],
            discarded=self.discarded + lost,
        )

    def transposed(self) -> Factorisation:
        """Return the factorisation of Dᵀ, its signs set by the same convention."""
        flip = _signs(self.v)
        return replace(self, u=self.v * flip, v=self.u * flip)


def finished(
    u: Tensor,
    s: Tensor,
    v: Tensor,
    *,
    rank: int,
    energy: float,
    floor: float,
    method: str,
    dtype: torch.dtype,
) -> Factorisation:
    """Cut computed singular triplets to `rank` and to what lies above `floor`; fix the signs.

    What is discarded is ‖D‖² − Σ s², which holds for every D·VVᵀ with orthonormal V, whether or
    not V is optimal; below the rounding of that difference it counts as nothing.
    """
    k = min(rank, int((s > floor).sum()))
    u, s, v = u[:, :k], s[:k], v[:, :k]
    discarded = energy - float(s.double().square().sum())
    rounding = 16 * torch.finfo(s.dtype).eps * energy
    sign = _signs(u)
    return Factorisation(
        u=(u * sign).to(dtype).contiguous(),
        s=s.to(dtype).contiguous(),
        v=(v * sign).to(dtype).contiguous(),
        energy=energy,
        discarded=discarded if discarded > rounding and math.isfinite(discarded) else 0.0,
        method=method,
    )


def _signs(u: Tensor) -> Tensor:
    """Return ±1 per column, such that the column's largest entry becomes positive."""
    largest = u.abs().argmax(dim=0, keepdim=True)
    return torch.where(u.gather(0, largest) < 0, -1.0, 1.0)[0].to(u.dtype)
