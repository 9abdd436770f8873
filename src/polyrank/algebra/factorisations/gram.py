"""Gram core: the fast path for a thin stack of single-precision factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorisations.project import project
from polyrank.algebra.factorisations.qr import factor_by_qr
from polyrank.algebra.lowrank import LowRank
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The subspace comes from eigenvectors of a matrix like DDᵀ whose rounding is about
# 1e-16·‖BᵀB‖‖AAᵀ‖. Up to this much cancellation, adversarial stacks were seen to end within
# 3e-8·‖D‖ of the optimum; beyond it the QR core takes over.
MOST_CANCELLATION = 64.0


def factor_by_gram(delta: LowRank, rank: int) -> Factorisation:
    """Factor D = BA from the R×R matrices BᵀB and AAᵀ, accumulated in float64.

    With BᵀB = QΛQᵀ, the matrix Λ½Qᵀ(AAᵀ)QΛ½ = PΣ²Pᵀ holds the squared singular values of D, and
    the rows of PᵀΛ½QᵀA span its right singular subspace. D projected on that subspace is factored
    by QR, so a squared condition number touches the choice of the subspace only: no singular value
    above 1e-8·σ₁ is lost. B_j and A_j are first scaled to equal norms (in the Gram matrices).

    When terms nearly cancel, ‖BᵀB‖‖AAᵀ‖ ≫ ‖D‖², the QR core is used instead; `method` says so.
    O((m + n)R²) time, about two thirds of the QR core's.
    """
    wide = delta.to(dtype=torch.float64)
    gram_b, gram_a = wide.b.T @ wide.b, wide.a @ wide.a.T
    even = _evened(gram_b, gram_a)
    gram_b, gram_a = gram_b * even * even[:, None], gram_a / even / even[:, None]
    energy = float((gram_b * gram_a).sum())
    strength = float(torch.linalg.matrix_norm(gram_b) * torch.linalg.matrix_norm(gram_a))
    if strength > MOST_CANCELLATION * energy:
        return factor_by_qr(delta, rank)
    weights, q = torch.linalg.eigh(gram_b)
    root = q * weights.clamp(min=0).sqrt()
    p = torch.linalg.eigh(root.T @ gram_a @ root).eigenvectors.flip(1)[:, :rank]
    v = torch.linalg.qr(wide.a.T @ (root @ p / even[:, None])).Q
    return project(
        wide,
        v,
        rank=rank,
        energy=energy,
        strength=strength**0.5,
        method="gram",
        dtype=delta.b.dtype,
    )


def _evened(gram_b: Tensor, gram_a: Tensor) -> Tensor:
    """Return t with ‖t_j B_j‖ = ‖A_j / t_j‖, and 1 where either is zero."""
    square_b, square_a = gram_b.diagonal(), gram_a.diagonal()
    known = (square_b > 0) & (square_a > 0)
    return torch.where(known, (square_a / square_b) ** 0.25, 1.0)
