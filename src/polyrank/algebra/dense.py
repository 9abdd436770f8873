"""An update of one matrix, kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.errors import FactorError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """The m×n matrix ΔW itself: for sums whose stack would be larger than the matrix.

    Raises FactorError unless `matrix` has two axes.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise FactorError(f"Dense: expected an m×n matrix, got {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        """An upper bound on the rank: min(m, n)."""
        return min(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return what the matrix is made of, by name: ``matrix``."""
        return {"matrix": self.matrix}

    def scale(self, factor: float) -> Dense:
        """Return `factor`·ΔW."""
        return Dense(self.matrix * factor)

    def norm(self) -> float:
        """Return ‖ΔW‖_F, summed in float64."""
        return float(torch.linalg.vector_norm(self.matrix, dtype=torch.float64))

    def dense(self) -> Tensor:
        """Return the m×n matrix (not a copy)."""
        return self.matrix

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Dense:
        """Return the same matrix in another dtype or on another device."""
        return Dense(self.matrix.to(dtype=dtype, device=device))

    def is_finite(self) -> bool:
        """Whether no entry is a NaN or an infinity."""
        return bool(torch.isfinite(self.matrix).all())
