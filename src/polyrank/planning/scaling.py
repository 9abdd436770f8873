"""How strongly a LoRA product counts at each rank: α and s in ΔW = s·B A."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from polyrank.errors import RankError, RecipeError


@dataclass(frozen=True)
class _Policy:
    alpha: Callable[[float, int], float]
    scale: Callable[[float, int], float]
    rank_stabilised: bool
    default: float


_POLICIES: Mapping[str, _Policy] = {
    "proportional": _Policy(lambda v, r: v * r, lambda v, _: v, False, 2.0),
    "fixed": _Policy(lambda v, _: v, lambda v, r: v / r, False, 16.0),
    "rslora": _Policy(lambda v, _: v, lambda v, r: v / math.sqrt(r), True, 16.0),
}


@dataclass(frozen=True)
class Scaling:
    """The scale s of every rank, by one of three policies.

    - ``proportional`` (default): s = `value` for every rank, so α = value·r. `value` is the factor.
    - ``fixed``: s = α/r (LoRA, arXiv 2106.09685, section 4.1). `value` is α.
    - ``rslora``: s = α/√r (rsLoRA, arXiv 2312.03732). `value` is α.

    Under mixed ranks a fixed α spreads s by the ratio of the ranks (16 times over 4…64), which is
    why ``proportional`` is the default. `value` None takes the policy's default: 2 or 16.
    Raises RecipeError for an unknown policy or a value that is not a positive finite number.
    """

    policy: str = "proportional"
    value: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise RecipeError(
                f"scaling.policy: expected one of {sorted(_POLICIES)}, got {self.policy!r}"
            )
        if self.value is not None and not (math.isfinite(self.value) and self.value > 0):
            raise RecipeError(
                f"scaling.value: expected a positive finite number, got {self.value!r}"
            )

    @property
    def rank_stabilised(self) -> bool:
        """Whether α is divided by √r and not by r (PEFT's ``use_rslora``)."""
        return _POLICIES[self.policy].rank_stabilised

    def alpha(self, rank: int) -> float:
        """Return the α to write beside this rank. Raises RankError unless rank ≥ 1."""
        return _POLICIES[self.policy].alpha(self._resolved(rank), rank)

    def scale(self, rank: int) -> float:
        """Return s, with ΔW = s·B A. Raises RankError unless rank ≥ 1."""
        return _POLICIES[self.policy].scale(self._resolved(rank), rank)

    def _resolved(self, rank: int) -> float:
        if rank < 1:
            raise RankError(f"Scaling: expected a rank of at least 1, got {rank}")
        return _POLICIES[self.policy].default if self.value is None else self.value
