"""Updates of matrices: sums, norms, truncated factorisations. torch only."""

from polyrank.algebra.adapter import Adapter
from polyrank.algebra.delta import Delta, distance, from_tensors
from polyrank.algebra.dense import Dense
from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorisations import factor_dense
from polyrank.algebra.factorise import METHODS, factorise
from polyrank.algebra.lowrank import LowRank
from polyrank.algebra.sparse import Sparse

__all__ = [
    "METHODS",
    "Adapter",
    "Delta",
    "Dense",
    "Factorisation",
    "LowRank",
    "Sparse",
    "distance",
    "factor_dense",
    "factorise",
    "from_tensors",
]
