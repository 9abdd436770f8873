"""QR core: the strict path for a thin stack."""

from __future__ import annotations

import math

from polyrank.algebra.factorisation import Factorisation, finished
from polyrank.algebra.lowrank import LowRank
from polyrank.lazy_torch import torch


def factor_by_qr(delta: LowRank, rank: int) -> Factorisation:
    """Factor D = BA through B = Q₁R₁, Aᵀ = Q₂R₂ and the SVD of the R×R core R₁R₂ᵀ, in float64.

    The error is a few times 1e-16·Σ_j ‖B_j‖‖A_j‖ whatever the condition of the stacks.
    O((m + n)R²) time, O((m + n)R) memory.
    """
    dtype = delta.b.dtype
    wide = delta.to(dtype=torch.float64)
    q_b, r_b = torch.linalg.qr(wide.b)
    q_a, r_a = torch.linalg.qr(wide.a.T)
    p, s, w = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    strength = float((r_b.norm(dim=0) * r_a.norm(dim=0)).sum())
    eps = torch.finfo(torch.float64).eps
    return finished(
        q_b @ p[:, :rank],
        s[:rank],
        q_a @ w[:rank].T,
        rank=rank,
        energy=float(s.square().sum()),
        floor=eps * math.sqrt(max(delta.shape)) * strength,
        method="qr",
        dtype=dtype,
    )
