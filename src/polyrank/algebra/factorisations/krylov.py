"""A growing block Krylov space of DᵀD and the best approximation of D inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # converted to float64 at a time


class KrylovSpace:
    """An orthonormal basis Q of a space of right vectors of D, with DQ and its Gram matrix.

    All are kept as rows: Q is K×n and Y = QDᵀ is K×m in the dtype of D; YYᵀ is K×K in float64,
    since in float32 it would lose what lies below 3e-4·σ₁. `most` bounds K.
    """

    def __init__(self, matrix: Tensor, most: int):
        m, n = matrix.shape
        self.matrix, self.width = matrix, 0
        self._q, self._y = matrix.new_empty(most, n), matrix.new_empty(most, m)
        self._gram = matrix.new_empty(0, 0, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Extend the basis by the span of `block`, b×n, orthonormalised against it."""
        start, stop = self.width, self.width + block.shape[0]
        known = self._q[:start]
        for _ in range(2):  # once leaves the rounding of a block that lies nearly in the basis
            block = torch.linalg.qr((block - (block @ known.T) @ known).T).Q.T
        self._q[start:stop] = block
        torch.mm(block, self.matrix.T, out=self._y[start:stop])
        new = self._y[start:stop].double()
        inner = new.new_empty(stop - start, stop)
        for begin in range(0, stop, _ROWS):
            end = min(begin + _ROWS, stop)
            inner[:, begin:end] = new @ self._y[begin:end].double().T
        gram = torch.cat([torch.cat([self._gram, inner[:, :start].T], dim=1), inner])
        self._gram, self.width = gram, stop

    def grow(self, width: int) -> None:
        """Extend the basis by DᵀD times its last `width` vectors."""
        self.add(self._y[self.width - width : self.width] @ self.matrix)

    def ritz(self) -> Tensor:
        """Return the squared singular values of D in the space, descending, in float64."""
        ritz: Tensor = torch.linalg.eigvalsh(self._gram)
        return ritz.flip(0)

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `ritz` and orthonormal columns, m×rank, of D's best left vectors in the space."""
        ritz, w = torch.linalg.eigh(self._gram)
        lead = w[:, -rank:].flip(1).to(self.matrix.dtype)
        return ritz.flip(0), torch.linalg.qr(self._y[: self.width].T @ lead).Q

    def has_room(self, width: int) -> bool:
        """Whether `width` more vectors stay within the bound."""
        return self.width + width <= len(self._q)

    def clear(self) -> None:
        """Forget all vectors."""
        self._gram, self.width = self._gram.new_empty(0, 0), 0
