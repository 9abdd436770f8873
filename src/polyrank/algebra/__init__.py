"""Low-rank updates of matrices: sums, norms, truncated factorisations. torch only."""

from polyrank.algebra.adapter import Adapter
from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorise import METHODS, factorise
from polyrank.algebra.lowrank import LowRank

__all__ = ["METHODS", "Adapter", "Factorisation", "LowRank", "factorise"]
