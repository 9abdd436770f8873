"""Algorithms that factor one matrix, one per file; `polyrank.algebra.factorise` chooses."""

from polyrank.algebra.factorisations.accumulate import accumulate
from polyrank.algebra.factorisations.dense import factor_dense
from polyrank.algebra.factorisations.gram import factor_by_gram
from polyrank.algebra.factorisations.qr import factor_by_qr
from polyrank.algebra.factorisations.randomised import factor_randomised

__all__ = ["accumulate", "factor_by_gram", "factor_by_qr", "factor_dense", "factor_randomised"]
