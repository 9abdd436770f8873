"""Randomised block Krylov iteration: the fastest path, and the only approximate one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from polyrank.algebra.factorisation import Factorisation
from polyrank.algebra.factorisations.dense import factor_dense
from polyrank.algebra.factorisations.krylov import KrylovSpace
from polyrank.algebra.factorisations.project import project
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The most by which ‖D − X‖ may exceed its smallest possible value, relative to ‖D‖.
MOST_EXCESS = 1e-3
# The last half step may gain no more than this: what would follow it is smaller.
_MOST_GAIN = 0.5 * MOST_EXCESS
# A space of more than this share of min(m, n) costs as much as the dense path.
_MOST_WIDTH = 0.5
_LEAST_BLOCK = 8
_PROBE, _PROBE_STEPS = 16, 2


def factor_randomised(
    matrix: Tensor, rank: int, *, warm: Tensor | None = None, seed: int = 0
) -> Factorisation:
    """Factor an m×n matrix D from products with thin blocks, or give up and call `factor_dense`.

    The space spanned by Ω, DᵀDΩ, (DᵀD)²Ω, …, with Ω Gaussian of rank/3 columns from `seed`, grows
    until the energy of the best rank-`rank` approximation inside it stands still. `warm`, an n×k
    matrix such as the V of the round before, is tried first, after one step with DᵀD (half a step
    if m < n), and dropped if it does not do. The matrix is turned so that m ≥ n. Everything runs
    in the dtype of D, Gram matrices in float64.

    Promise: ‖D − X‖ exceeds the smallest possible error by at most 1e-3·‖D‖. It is checked by
    estimates, not proved. (1) The energy still to be found follows from the last two gains as a
    geometric series or, behind a gap, from σ_{rank+1}. (2) A few new Gaussian vectors must then
    find as good as nothing outside the space: this discovers a `warm` that misses directions, and
    singular values that are equal by the dozen. (3) The last half step, X = UUᵀD, must gain as
    good as nothing. Where this needs a space wider than min(m, n)/2, `factor_dense` takes over,
    and `method` of the result says so.

    A space of K vectors takes (m + n)·K entries beside D; K was seen to be 1.2 to 6 times `rank`.
    Halko, Martinsson & Tropp, arXiv 0909.4061; Musco & Musco, arXiv 1504.05477; the check is ours.
    """
    m, n = matrix.shape
    if m < n:
        left = None if warm is None else matrix @ warm.to(matrix)
        return _tall(matrix.T, rank, left, seed).transposed()
    right = None if warm is None else matrix.T @ (matrix @ warm.to(matrix))
    return _tall(matrix, rank, right, seed)


def _tall(matrix: Tensor, rank: int, start: Tensor | None, seed: int) -> Factorisation:
    search = _Search(matrix, rank, seed)
    factorisation = None if start is None else search.tried(start)
    while factorisation is None and search.grow():
        factorisation = search.confirmed(0.0)
    del search  # its space is as large as what the dense path needs
    return factor_dense(matrix, rank) if factorisation is None else factorisation


class _Search:
    """The space, its random numbers, and the estimates of what it misses."""

    def __init__(self, matrix: Tensor, rank: int, seed: int):
        self.matrix, self.rank = matrix, rank
        self.block = max(_LEAST_BLOCK, math.ceil(rank / 3))
        self.space = KrylovSpace(matrix, int(_MOST_WIDTH * matrix.shape[1]))
        rows = torch.linalg.vector_norm(matrix, dim=1)
        self.energy = float(rows.double().square().sum())
        self.draw = torch.Generator().manual_seed(seed)

    def tried(self, start: Tensor) -> Factorisation | None:
        """Return the confirmed factorisation from these columns; else None, and empty the space."""
        if start.shape[1] < self.rank or not self.space.has_room(start.shape[1]):
            return None
        self.space.add(start.T)
        factorisation = self.confirmed(math.inf)
        if factorisation is None:
            self.space.clear()
        return factorisation

    def grow(self) -> bool:
        """Grow the space from a new Gaussian block until it stands still; False: out of room."""
        if not self.space.has_room(self.block):
            return False
        self._add_random(self.block)
        captured: list[float] = []
        while True:
            if self.space.width >= self.rank:
                ritz = self.space.ritz()
                captured.append(self._leading(ritz))
                if self._excess(captured[-1], self._missing(captured, ritz)) <= MOST_EXCESS:
                    return True
            if not self.space.has_room(self.block):
                return False
            self.space.grow(self.block)

    def confirmed(self, doubt: float) -> Factorisation | None:
        """Return the factorisation if neither new vectors nor a half step add much to it.

        The energy missed is at most `doubt`, or what a gap behind σ_rank leaves possible.
        """
        if not self.space.has_room(_PROBE * (1 + _PROBE_STEPS)):
            return None
        before = self._leading(self.space.ritz())
        self._add_random(_PROBE)
        for _ in range(_PROBE_STEPS):
            self.space.grow(_PROBE)
        ritz, left = self.space.best(self.rank)
        captured = self._leading(ritz)
        # The probe finds up to _PROBE of as many as `rank` directions.
        unseen = max(captured - before, 0.0) * max(1.0, self.rank / _PROBE)
        unseen += min(doubt, _behind_gap(ritz, self.rank))
        if self._excess(captured, unseen) > MOST_EXCESS:
            return None
        factorisation = project(
            self.matrix.T,
            left,
            rank=self.rank,
            energy=self.energy,
            strength=math.sqrt(self.energy),
            method="randomised",
            dtype=self.matrix.dtype,
        ).transposed()
        final = float(factorisation.s.double().square().sum())
        return factorisation if self._excess(final, final - captured) <= _MOST_GAIN else None

    def _add_random(self, width: int) -> None:
        n = self.matrix.shape[1]
        new = torch.randn(width, n, generator=self.draw, dtype=torch.float64)
        self.space.add(new.to(self.matrix))

    def _leading(self, ritz: Tensor) -> float:
        return float(ritz[: self.rank].sum())

    def _excess(self, captured: float, missing: float) -> float:
        """(‖D − X‖ − smallest) / ‖D‖ if X holds `captured` and the best has `missing` more."""
        if self.energy == 0.0:
            return 0.0
        rest = max(self.energy - captured, 0.0)
        best = max(rest - max(missing, 0.0), 0.0)
        return (math.sqrt(rest) - math.sqrt(best)) / math.sqrt(self.energy)

    def _missing(self, captured: list[float], ritz: Tensor) -> float:
        """Estimate the energy that the best approximation has beyond the last `captured`."""
        gains = [after - before for before, after in pairwise(captured)]
        if not gains:
            return math.inf
        last = max(gains[-1], 0.0)
        series = math.inf
        if len(gains) > 1 and last < gains[-2]:
            ratio = last / gains[-2]
            series = last * max(ratio / (1 - ratio), 0.5)
        return min(series, last + _behind_gap(ritz, self.rank))


def _behind_gap(ritz: Tensor, rank: int) -> float:
    """Bound what vectors outside the space can add, if none has more than twice ritz[rank].

    Ritz values of a random space lie below the eigenvalues; a factor of two allows for that.
    """
    if len(ritz) <= rank:
        return math.inf
    return float((2 * ritz[rank] - ritz[:rank]).clamp(min=0).sum())
