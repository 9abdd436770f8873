"""The sum D + Σ w_i (result_i − start_i) as a short list of low-rank terms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polyrank.aggregation.incoming import Change
from polyrank.algebra import LowRank
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Starts that fit no basis become a new one, up to this many; later ones go out singly, so
# that memory does not grow with the number of clients.
_MOST_BASES = 16


class _Basis:
    """Factors with one coefficient per direction: Σ_j c_j B_j A_j."""

    def __init__(self, term: LowRank):
        self.term = term
        self.coefficients = torch.zeros(term.rank, dtype=torch.float64)

    def take(self, weight: float, term: LowRank) -> bool:
        """Add weight·term and return True if, bit by bit, one of the two is the other's prefix."""
        shared = min(term.rank, self.term.rank)
        if not _identical(self.term.prefix(shared), term.prefix(shared)):
            return False
        if term.rank > shared:
            more = term.rank - shared
            self.term = term
            self.coefficients = torch.nn.functional.pad(self.coefficients, (0, more))
        self.coefficients[: term.rank] += weight
        return True

    def sum(self) -> LowRank:
        b: Tensor = self.term.b * self.coefficients.to(self.term.b)
        return LowRank(b, self.term.a)


def incremented(server: LowRank, changes: Iterator[Change]) -> Iterator[LowRank]:
    """Yield terms whose sum is D + Σ w_i (result_i − start_i), where D = `held`.

    Clients are sent prefixes of one set of factors, so their starts are not stacked again:
    as long as they agree bit by bit they share one basis and only their weights are summed. That
    holds for rounded factors too, since rounding a prefix is the prefix of rounding. A result that
    is identical to a start joins its basis and cancels exactly.
    """
    bases = [_Basis(server)]
    bases[0].take(1.0, server)
    for change in changes:
        for weight, term in ((-change.weight, change.start), (change.weight, change.result)):
            if any(basis.take(weight, term) for basis in bases):
                continue
            if weight < 0 and len(bases) < _MOST_BASES:
                bases.append(_Basis(term))
                bases[-1].take(weight, term)
            else:
                yield term.scale(weight)
    for basis in bases:
        yield basis.sum()


def _identical(first: LowRank, second: LowRank) -> bool:
    if first.b.dtype != second.b.dtype or first.shape != second.shape:
        return False
    if not torch.equal(first.b[:1], second.b[:1]):
        return False  # most pairs differ in the first row already
    return torch.equal(first.b, second.b) and torch.equal(first.a, second.a)
