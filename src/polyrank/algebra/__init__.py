"""Low-rank updates of matrices: sums, norms, truncated factorisations. torch only."""

from polyrank.algebra.adapter import Adapter
from polyrank.algebra.lowrank import LowRank

__all__ = ["Adapter", "LowRank"]
