"""Shortening an update that moved too far, instead of refusing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter, Delta, Dense, LowRank, Sparse, distance
from polyrank.errors import UpdateError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_TRIES = 60


def increment(start: Delta, came: Delta) -> float:
    """Return ‖came − start‖_F in float64; entries of `Sparse` are compared at their positions."""
    if isinstance(start, Sparse) and isinstance(came, Sparse):
        return float(torch.linalg.vector_norm(came.values.double() - start.values.double()))
    return distance(came, start)


def moved(adapter: Adapter[Delta], assignment: Assignment) -> float:
    """Return ‖ΔW − start‖_F over all sites together."""
    return math.hypot(*(increment(start, adapter[s]) for s, start in assignment.start.items()))


def shortened(start: Delta, came: Delta, c: float) -> Delta:
    """Return the update at the share c of the way from the start to what came.

    W(c) is made of start + c·(came − start), tensor by tensor: both factors, the values, or the
    entries. So the rank, the positions and an A that was not trained stay what they are. Computed
    in float64, in the dtype of what came.
    """
    if isinstance(start, LowRank) and isinstance(came, LowRank):
        return LowRank(_between(start.b, came.b, c), _between(start.a, came.a, c))
    if isinstance(start, Sparse) and isinstance(came, Sparse):
        return Sparse(_between(start.values, came.values, c), came.positions, came.shape)
    if isinstance(start, Dense) and isinstance(came, Dense):
        return Dense(_between(start.matrix, came.matrix, c))
    raise UpdateError(f"expected {type(start).__name__}, got {type(came).__name__}")


def clipped(update: Update, assignment: Assignment, bound: float) -> tuple[Update, float]:
    """Return the update shortened to an increment of at most `bound`, and the factor c in (0, 1].

    One c holds for all sites, so the direction among them stays. With B = B₀ + c·β, A = A₀ + c·α
    the increment at a site is c·(βA₀ + B₀α) + c²·βα, and ‖·‖² over all sites is
    F(c) = c²·(p + 2xc + qc²). That need not grow with c (x < 0, 9x² > 8pq: the two terms oppose
    each other), so c is the largest in (0, 1] with F(c) ≤ bound²: F is monotone between the roots
    of F', which are known, and the topmost piece that meets the bound is bisected (relative error
    1e-12). If F(1) meets it, c = 1 and the update is the same object.

    The bound holds for the result as it is kept: where rounding to its dtype leads beyond it, c is
    lowered, by little at first, until it does not. In float32 that costs about 1e-6 of the length,
    more where the bound is near the rounding of the start. Ours; clipping as such is usual in
    robust aggregation.

    Raises UpdateError if the norm is beyond float64, or no c > 0 meets the bound in this dtype.
    """
    reached = moved(update.adapter, assignment)
    if not math.isfinite(reached):
        raise UpdateError("its increment is too large to be measured, so it cannot be shortened")
    if reached <= bound:
        return update, 1.0
    path = _Path.of(update.adapter, assignment)
    aim = bound
    for attempt in range(_TRIES):
        c = path.largest(aim)
        if not c > 0:
            break
        adapter = _at(update.adapter, assignment, c)
        length = moved(adapter, assignment)
        if length <= bound:
            return replace(update, adapter=adapter), c
        aim *= min(bound / length, 1 - min(0.999, 1e-9 * 4**attempt))
    raise UpdateError(
        f"its increment of norm {reached:.4g} cannot be shortened to {bound:g}: that is below the "
        "rounding of its numbers; raise clip_increment"
    )


@dataclass(frozen=True)
class _Path:
    """F(c) = c²·(p + 2xc + qc²): the squared length of the increment along the way."""

    p: float
    x: float
    q: float

    @staticmethod
    def of(came: Adapter[Delta], assignment: Assignment) -> _Path:
        """Return it, summed over the sites from small cores."""
        terms = [_coefficients(start, came[site]) for site, start in assignment.start.items()]
        return _Path(*(math.fsum(column) for column in zip(*terms, strict=True)))

    def length(self, c: float) -> float:
        """Return √F(c)."""
        return c * math.sqrt(max(0.0, self.p + c * (2 * self.x + c * self.q)))

    def largest(self, bound: float) -> float:
        """Return the largest c in [0, 1] whose length is at most `bound`."""
        if self.length(1.0) <= bound:
            return 1.0
        high = 1.0
        for low in (*self._turns(), 0.0):  # From the top; the length is monotone from low to high.
            if self.length(low) <= bound:
                return _bisected(lambda c: self.length(c) <= bound, low, high)
            high = low
        return 0.0

    def _turns(self) -> list[float]:
        """Where F' = 2c·(p + 3xc + 2qc²) changes sign in (0, 1), the largest first."""
        root = 9 * self.x**2 - 8 * self.p * self.q
        if root <= 0 or self.x >= 0:
            return []
        far = (-3 * self.x + math.sqrt(root)) / 2  # Stable: x < 0, so nothing cancels.
        turns = [far / (2 * self.q)] if self.q > 0 else []
        turns.append(self.p / far)
        return [c for c in turns if 0 < c < 1]


def _bisected(fits: Callable[[float], bool], low: float, high: float) -> float:
    """Return the end of what fits between low, which does, and high, which does not."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _coefficients(start: Delta, came: Delta) -> tuple[float, float, float]:
    """(p, x, q) of one site; what is kept whole, or at few entries, moves in a straight line."""
    if not (isinstance(start, LowRank) and isinstance(came, LowRank)):
        return increment(start, came) ** 2, 0.0, 0.0
    b, a = start.b.double(), start.a.double()
    beta, alpha = came.b.double() - b, came.a.double() - a
    r = start.rank
    # With [β B₀] = Q R and [A₀ᵀ αᵀ] = Q' R', norms and inner products are those of the cores R·R'ᵀ.
    left = _core(torch.cat([beta, b], dim=1))
    right = _core(torch.cat([a.T, alpha.T], dim=1)).T
    linear, quadratic = left @ right, left[:, :r] @ right[r:]
    inner = float((linear * quadratic).sum())
    return float(linear.square().sum()), inner, float(quadratic.square().sum())


def _core(x: Tensor) -> Tensor:
    """The factor R of a thin QR; of a matrix wider than long, itself."""
    return x if x.shape[0] <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def _at(came: Adapter[Delta], assignment: Assignment, c: float) -> Adapter[Delta]:
    return Adapter({s: shortened(start, came[s], c) for s, start in assignment.start.items()})


def _between(start: Tensor, came: Tensor, c: float) -> Tensor:
    """start + c·(came − start) in the dtype of what came; the same where nothing was trained."""
    if torch.equal(start.to(came.dtype), came):
        return came
    return (start.double() + c * (came.double() - start.double())).to(came.dtype)
