"""The last step that several algorithms share: D on a known right subspace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from polyrank.algebra.factorisation import Factorisation, finished
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


class Matrix(Protocol):
    """What can be multiplied by a thin matrix: a Tensor, a LowRank."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""
        ...

    def __matmul__(self, x: Tensor, /) -> Tensor:
        """Return D x."""
        ...


def project(
    delta: Matrix,
    v: Tensor,
    *,
    rank: int,
    energy: float,
    strength: float,
    method: str,
    dtype: torch.dtype,
) -> Factorisation:
    """Factor D·VVᵀ for an n×k matrix V with orthonormal columns: DV = QR, R = PΣWᵀ, U = QP, VW.

    The error in the product is of second order in the error of the subspace. Singular values below
    the rounding of `strength`, the norm of what was summed to D, count as zero.
    """
    q, r = torch.linalg.qr(delta @ v)
    p, s, w = torch.linalg.svd(r, full_matrices=False)
    return finished(
        q @ p,
        s,
        v @ w.T,
        rank=rank,
        energy=energy,
        floor=torch.finfo(v.dtype).eps * math.sqrt(max(delta.shape)) * strength,
        method=method,
        dtype=dtype,
    )
