"""Updates of one matrix, in whichever form they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from polyrank.algebra.dense import Dense
from polyrank.algebra.lowrank import LowRank
from polyrank.algebra.sparse import Sparse
from polyrank.errors import FactorError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Delta = LowRank | Dense | Sparse
"""An m×n update ΔW: as factors, whole, or at few entries. All share shape, rank, nbytes, tensors,
scale, norm, dense, to and is_finite."""


def added(one: Delta, other: Delta) -> Delta:
    """Return the exact sum: two low-rank updates are stacked, anything else becomes dense.

    Raises FactorError if the shapes differ.
    """
    if one.shape != other.shape:
        raise FactorError(f"sum of updates: shapes {one.shape} and {other.shape} differ")
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one + other
    return Dense(one.dense() + other.dense())


def distance(one: Delta, other: Delta) -> float:
    """Return ‖one − other‖_F in float64, without forming a product where both are factors.

    Raises FactorError if the shapes differ.
    """
    if one.shape != other.shape:
        raise FactorError(f"distance of updates: shapes {one.shape} and {other.shape} differ")
    one, other = one.to(dtype=torch.float64), other.to(dtype=torch.float64)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return (one - other).norm()
    return float(torch.linalg.vector_norm(one.dense() - other.dense()))


def from_tensors(tensors: Mapping[str, Tensor]) -> Delta:
    """Return the update that gave these `tensors`; FactorError if none gives such names."""
    names = set(tensors)
    if names == {"b", "a"}:
        return LowRank(tensors["b"], tensors["a"])
    if names == {"matrix"}:
        return Dense(tensors["matrix"])
    if names == {"values", "positions", "shape"}:
        m, n = (int(size) for size in tensors["shape"])
        return Sparse(tensors["values"], tensors["positions"], (m, n))
    raise FactorError(f"update of one matrix: no kind is made of {sorted(names)}")
