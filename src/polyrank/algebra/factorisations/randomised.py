"""Randomised subspace iteration: the fastest path, and the only approximate one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorisations.project import project
from polyrank.algebra.lowrank import LowRank

OVERSAMPLING = 16
POWER = 2


def factor_randomised(
    delta: LowRank | Tensor, rank: int, *, warm: Tensor | None = None, seed: int = 0
) -> Factorisation:
    """Factor D from products with a thin matrix: (DᵀD)^q DᵀD·Ω spans the right subspace.

    Ω is n×(rank + 16), Gaussian from `seed`; q = 2. `warm`, an n×k matrix such as the V of the
    round before, replaces the first columns of Ω, and then q = 0. With a gap behind σ_rank the
    result is exact to rounding; without one the error may exceed the optimum by about 1e-3·‖D‖
    (2e-4·‖D‖ where the tail is flat), so it is used only when asked for by name.
    Everything runs in the dtype of D. Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    sample = delta.b if isinstance(delta, LowRank) else delta
    n = delta.shape[1]
    width = min(rank + OVERSAMPLING, *delta.shape)
    draw = torch.Generator().manual_seed(seed)
    omega = torch.randn(n, width, generator=draw, dtype=torch.float64).to(sample)
    if warm is not None:
        known = warm[:, :width].to(sample)
        omega[:, : known.shape[1]] = known
    for _ in range(1 if warm is not None else 1 + POWER):
        left = torch.linalg.qr(delta @ omega).Q
        omega = torch.linalg.qr(delta.T @ left).Q
    energy = _energy(delta)
    return project(
        delta,
        omega,
        rank=rank,
        energy=energy,
        strength=math.sqrt(energy),
        method="randomised",
        dtype=sample.dtype,
    )


def _energy(delta: LowRank | Tensor) -> float:
    if isinstance(delta, Tensor):
        return float(torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2)
    products = (delta.b.T @ delta.b) * (delta.a @ delta.a.T)
    return max(0.0, float(products.sum(dtype=torch.float64)))
