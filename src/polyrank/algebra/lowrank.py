"""An update of one matrix, kept as its factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.errors import FactorError, RankError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ΔW = B A, held as factors with every scale folded in.

    `b` is m×r and `a` is r×n (m out, n in, r rank; r may be 0: the zero matrix). Adding stacks the
    factors, which is exact; nothing here rounds the sum to a lower rank — `factorise` does, when
    asked. The factors of a ΔW are not unique (BG, G⁻¹A give the same), so two LowRanks are compared
    by the norm of their difference, not by their factors, and `==` is identity.

    Raises FactorError if the factors are not two matrices with a common rank, dtype and device.
    """

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        b, a = self.b, self.a
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise FactorError(
                f"LowRank: expected B of m×r and A of r×n with the same r, got B {tuple(b.shape)} "
                f"and A {tuple(a.shape)}; nothing is broadcast"
            )
        if b.dtype != a.dtype or b.device != a.device:
            raise FactorError(
                f"LowRank: B is {b.dtype} on {b.device}, A is {a.dtype} on {a.device}; bring both "
                "to one dtype and device first"
            )

    @staticmethod
    def zero(
        m: int, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> LowRank:
        """Return the m×n zero matrix: rank 0, no memory; float32 if no dtype is given."""
        dtype = dtype or torch.float32
        return LowRank(
            torch.zeros(m, 0, dtype=dtype, device=device),
            torch.zeros(0, n, dtype=dtype, device=device),
        )

    @staticmethod
    def stack(terms: Iterable[LowRank]) -> LowRank:
        """Return the exact sum ``Σ B_i A_i = [B_1 … B_k][A_1; …; A_k]``; its rank is Σ r_i.

        Raises FactorError if there is no term or the shapes differ.
        """
        listed = list(terms)
        if not listed:
            raise FactorError("LowRank.stack: expected at least one term, got none")
        shapes = {term.shape for term in listed}
        if len(shapes) > 1:
            raise FactorError(f"LowRank.stack: terms of different shapes {sorted(shapes)}")
        if len(listed) == 1:
            return listed[0]
        return LowRank(
            torch.cat([term.b for term in listed], dim=1),
            torch.cat([term.a for term in listed], dim=0),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix that the factors stand for."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of B: an upper bound on the rank of the product."""
        return self.b.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.b.nbytes + self.a.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """Return what the matrix is made of, by name: ``b`` and ``a``."""
        return {"b": self.b, "a": self.a}

    @property
    def T(self) -> LowRank:
        """The transpose AᵀBᵀ (views, no copy)."""
        return LowRank(self.a.T, self.b.T)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return B(A x) for an n×k matrix, without forming BA."""
        return self.b @ (self.a @ x)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank.stack((self, other))

    def __sub__(self, other: LowRank) -> LowRank:
        return LowRank.stack((self, other.scale(-1.0)))

    def scale(self, factor: float) -> LowRank:
        """Return `factor`·BA; the factor goes into B."""
        return LowRank(self.b * factor, self.a)

    def prefix(self, rank: int) -> LowRank:
        """Return the product of the first `rank` columns of B and rows of A (views, no copy).

        Of factors ordered by singular value this is the best approximation of that rank.
        Raises RankError if `rank` is negative or above the stored rank.
        """
        if not 0 <= rank <= self.rank:
            raise RankError(f"LowRank.prefix: expected a rank in 0…{self.rank}, got {rank}")
        return LowRank(self.b[:, :rank], self.a[:rank])

    def inner(self, other: LowRank) -> float:
        """Return ⟨B₁A₁, B₂A₂⟩_F = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), in float64, without forming a product."""
        if self.shape != other.shape:
            raise FactorError(f"LowRank.inner: shapes {self.shape} and {other.shape} differ")
        b = self.b.double().T @ other.b.double()
        a = self.a.double() @ other.a.double().T
        return float((b * a).sum())

    def norm(self) -> float:
        """Return ‖BA‖_F without forming the product.

        Through the small cores of two QR factorisations in float64, so that a difference of nearly
        equal terms keeps its digits where the Gram matrix would lose half of them.
        """
        if self.rank == 0:
            return 0.0
        if self.rank >= min(self.shape):
            return float(torch.linalg.matrix_norm(self.b.double() @ self.a.double()))
        r_b = torch.linalg.qr(self.b.double(), mode="r").R
        r_a = torch.linalg.qr(self.a.double().T, mode="r").R
        return float(torch.linalg.matrix_norm(r_b @ r_a.T))

    def dense(self) -> Tensor:
        """Return the m×n product."""
        return self.b @ self.a

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        """Return the same factors in another dtype or on another device."""
        return LowRank(self.b.to(dtype=dtype, device=device), self.a.to(dtype=dtype, device=device))

    def is_finite(self) -> bool:
        """Whether neither factor holds a NaN or an infinity."""
        return _is_finite(self.b) and _is_finite(self.a)


def _is_finite(x: Tensor) -> bool:
    # A NaN or an infinity makes the sum one too; only a sum that overflows needs a second look.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
