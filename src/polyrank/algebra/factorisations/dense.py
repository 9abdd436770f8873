"""Dense factorisation, for when the stack is no thinner than the matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polyrank.algebra.factorisation import Factorisation, finished
from polyrank.algebra.factorisations.project import project
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _COLUMNS = 512, 256


class _Wide:
    """A dense matrix whose products are taken in float64, a block of rows at a time."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.shape = matrix, (matrix.shape[0], matrix.shape[1])

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.cat([rows.double() @ x for rows in torch.split(self.matrix, _ROWS)])

    def gram(self) -> Tensor:
        """DᵀD in float64, the blocks on and below the diagonal only."""
        n = self.shape[1]
        total = self.matrix.new_zeros(n, n, dtype=torch.float64)
        for rows in torch.split(self.matrix, _ROWS):
            wide = rows.double()
            for j in range(0, n, _COLUMNS):
                total[j:, j : j + _COLUMNS].addmm_(wide[:, j:].T, wide[:, j : j + _COLUMNS])
        return total


def factor_dense(matrix: Tensor, rank: int) -> Factorisation:
    """Factor an m×n matrix: a float64 one by SVD, a float32 one from its Gram matrix in float64.

    The second way takes the leading eigenvectors of DᵀD (of DDᵀ if m < n), accumulated in float64,
    and factors D projected on them: singular values above 1e-8·σ₁ are kept. O(mn·min(m, n)) time;
    memory is one float64 matrix of min(m, n)² beside D.
    """
    m, n = matrix.shape
    if matrix.dtype == torch.float64:
        return _by_svd(matrix, rank)
    if m < n:
        return factor_dense(matrix.T, rank).transposed()
    wide = _Wide(matrix)
    gram = wide.gram()
    energy = float(gram.trace())
    v = torch.linalg.eigh(gram, UPLO="L").eigenvectors[:, -rank:].flip(1)
    del gram
    return project(
        wide,
        v,
        rank=rank,
        energy=energy,
        strength=math.sqrt(energy),
        method="dense",
        dtype=matrix.dtype,
    )


def _by_svd(matrix: Tensor, rank: int) -> Factorisation:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    energy = float(s.square().sum())
    eps = torch.finfo(torch.float64).eps
    return finished(
        u[:, :rank],
        s[:rank],
        vh[:rank].T,
        rank=rank,
        energy=energy,
        floor=eps * math.sqrt(max(matrix.shape)) * math.sqrt(energy),
        method="dense",
        dtype=matrix.dtype,
    )
