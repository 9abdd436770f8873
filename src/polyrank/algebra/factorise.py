"""The sum of low-rank terms, factored once: the server's step for one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorisations import (
    accumulate,
    factor_by_gram,
    factor_by_qr,
    factor_dense,
    factor_randomised,
)
from polyrank.algebra.lowrank import LowRank
from polyrank.errors import FactorError, RankError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    _Algorithm = Callable[[Iterator[LowRank], int, Tensor | None, int], Factorisation]

# A stack is thin while its rank is below these shares of min(m, n). Measured on one CPU thread:
# two eigenproblems of size R against one of size min(m, n) break even near 0.8.
_THIN = 0.75
_THIN_FOR_SKETCH = 0.25


def factorise(
    terms: LowRank | Iterable[LowRank],
    rank: int,
    *,
    method: str = "auto",
    warm: Tensor | None = None,
    seed: int = 0,
) -> Factorisation:
    """Return the best rank-`rank` approximation of D = Σ terms.

    `terms` are m×n low-rank matrices; an iterable is read once and lazily. The result has the
    widest dtype of the terms, float32 at least.

    ============  ================================================================================
    method
    ============  ================================================================================
    `auto`        one of the next three by shape and dtype; excess error at most 1e-6·‖D‖
    `gram`        thin stacks: Gram matrices in float64; hands over to `qr` when terms cancel
    `qr`          thin stacks: QR and a small SVD in float64; the strict path
    `dense`       D is accumulated in one m×n buffer, terms are dropped as they are read
    `randomised`  thick stacks: a checked Krylov space, excess error at most 1e-3·‖D‖, else `dense`;
                  `warm` (last round's v) and `seed` serve it alone. Thin ones: as `gram`
    ============  ================================================================================

    `auto` takes `qr` for float64 and `gram` for float32 terms, and `dense` once the stacked rank
    exceeds three quarters of min(m, n), so that memory does not grow with the number of terms.

    Raises RankError for a rank below 1, FactorError for no terms, terms of different shapes or
    entries that are not finite, ValueError for an unknown method.
    """
    if rank < 1:
        raise RankError(f"factorise: expected a rank of 1 or more, got {rank}")
    if method not in METHODS:
        raise ValueError(f"factorise: unknown method {method!r}; one of {sorted(METHODS)}")
    listed = (terms,) if isinstance(terms, LowRank) else terms
    with torch.no_grad():
        return METHODS[method](_checked(listed), rank, warm, seed)


def _auto(terms: Iterator[LowRank], rank: int, _warm: Tensor | None, _seed: int) -> Factorisation:
    delta = _gather(terms, _THIN)
    if isinstance(delta, torch.Tensor):
        return factor_dense(delta, rank)
    strict = delta.b.dtype == torch.float64
    return factor_by_qr(delta, rank) if strict else factor_by_gram(delta, rank)


def _gram(terms: Iterator[LowRank], rank: int, _warm: Tensor | None, _seed: int) -> Factorisation:
    return factor_by_gram(_stack(terms), rank)


def _qr(terms: Iterator[LowRank], rank: int, _warm: Tensor | None, _seed: int) -> Factorisation:
    return factor_by_qr(_stack(terms), rank)


def _dense(terms: Iterator[LowRank], rank: int, _warm: Tensor | None, _seed: int) -> Factorisation:
    return factor_dense(accumulate(terms), rank)


def _randomised(
    terms: Iterator[LowRank], rank: int, warm: Tensor | None, seed: int
) -> Factorisation:
    delta = _gather(terms, _THIN_FOR_SKETCH)
    if isinstance(delta, torch.Tensor):
        return factor_randomised(delta, rank, warm=warm, seed=seed)
    return factor_by_gram(delta, rank)


METHODS: dict[str, _Algorithm] = {
    "auto": _auto,
    "gram": _gram,
    "qr": _qr,
    "dense": _dense,
    "randomised": _randomised,
}


def _checked(terms: Iterable[LowRank]) -> Iterator[LowRank]:
    """Yield the terms, at least in float32, refusing other shapes and entries not finite."""
    shape = None
    for index, term in enumerate(terms):
        shape = shape or term.shape
        if term.shape != shape:
            raise FactorError(
                f"factorise: term {index} is {term.shape}, the ones before are {shape}"
            )
        if not term.is_finite():
            raise FactorError(
                f"factorise: term {index} has entries that are NaN or infinite; leave it out"
            )
        yield term.to(dtype=torch.promote_types(term.b.dtype, torch.float32))
    if shape is None:
        raise FactorError("factorise: expected at least one term, got none")


def _gather(terms: Iterator[LowRank], thin: float) -> LowRank | Tensor:
    """Return the stack, or the dense sum as soon as the stack is no longer thin."""
    gathered: list[LowRank] = []
    rank = 0
    for term in terms:
        gathered.append(term)
        rank += term.rank
        if rank > thin * min(term.shape):
            del term
            return accumulate(chain(_drained(gathered), terms))
    return _stack(_drained(gathered))


def _drained(gathered: list[LowRank]) -> Iterator[LowRank]:
    """Yield the terms in order, keeping no reference to a term once the next is asked for."""
    gathered.reverse()
    while gathered:
        yield gathered.pop()


def _stack(terms: Iterator[LowRank]) -> LowRank:
    listed = list(terms)
    widest = max((term.b.dtype for term in listed), key=lambda dtype: dtype.itemsize)
    return LowRank.stack(term.to(dtype=widest) for term in listed)
