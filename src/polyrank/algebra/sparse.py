"""An update of one matrix at few of its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.errors import FactorError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """The m×n matrix ΔW that is zero but for `values` at the flat `positions` row·n + column.

    `values` is [k], `positions` int64 [k], without repetition. Where positions derive from a seed
    that both sides know, only the values travel; `nbytes` counts them alone.

    Raises FactorError if the two are not vectors of one length.
    """

    values: Tensor
    positions: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.values.shape != self.positions.shape:
            raise FactorError(
                f"Sparse: expected one position per value, got values {tuple(self.values.shape)} "
                f"and positions {tuple(self.positions.shape)}"
            )

    @property
    def rank(self) -> int:
        """An upper bound on the rank: min(m, n, k)."""
        return min(*self.shape, self.values.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return what the matrix is made of, by name: ``values``, ``positions`` and ``shape``."""
        return {
            "values": self.values,
            "positions": self.positions,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
        }

    def scale(self, factor: float) -> Sparse:
        """Return `factor`·ΔW."""
        return Sparse(self.values * factor, self.positions, self.shape)

    def norm(self) -> float:
        """Return ‖ΔW‖_F, summed in float64."""
        return float(torch.linalg.vector_norm(self.values, dtype=torch.float64))

    def dense(self) -> Tensor:
        """Return the m×n matrix."""
        m, n = self.shape
        flat = self.values.new_zeros(m * n)
        flat[self.positions.to(self.values.device)] = self.values
        return flat.view(m, n)

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Sparse:
        """Return the same matrix with its values in another dtype, or on another device."""
        return Sparse(
            self.values.to(dtype=dtype, device=device),
            self.positions.to(device=device),
            self.shape,
        )

    def is_finite(self) -> bool:
        """Whether no value is a NaN or an infinity."""
        return bool(torch.isfinite(self.values).all())
