"""LoRA's scale at each rank: α and s in ΔW = s·B A."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Gt

from polyrank.errors import RankError
from polyrank.settings import OneOf, check


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
    """How strongly a LoRA product counts at each rank r: ΔW = s·BA.

    Under mixed ranks a fixed α spreads s by the ratio of the ranks (16 times over 4…64), which is
    why ``proportional`` is the default: α = `alpha`·r. ``fixed`` is LoRA's (arXiv 2106.09685,
    section 4.1), ``rslora`` rsLoRA's (arXiv 2312.03732).
    """

    scaling: Annotated[str, OneOf(_POLICIES)] = field(
        default="proportional", metadata={"stored": "policy"}
    )
    """`proportional`: s = alpha for every rank; `fixed`: s = alpha/r; `rslora`: s = alpha/√r."""
    alpha: Annotated[float, Gt(0)] | None = field(default=None, metadata={"stored": "value"})
    """Left out: 2 with `proportional`, otherwise 16."""

    def __post_init__(self) -> None:
        check(self, "lora")

    @property
    def rank_stabilised(self) -> bool:
        """Whether α is divided by √r and not by r (PEFT's ``use_rslora``)."""
        return _POLICIES[self.scaling].rank_stabilised

    def lora_alpha(self, rank: int) -> float:
        """Return the α to write beside this rank. Raises RankError unless rank ≥ 1."""
        return _POLICIES[self.scaling].alpha(self._resolved(rank), rank)

    def scale(self, rank: int) -> float:
        """Return s, with ΔW = s·B A. Raises RankError unless rank ≥ 1."""
        return _POLICIES[self.scaling].scale(self._resolved(rank), rank)

    def _resolved(self, rank: int) -> float:
        if rank < 1:
            raise RankError(f"Scaling: expected a rank of at least 1, got {rank}")
        return _POLICIES[self.scaling].default if self.alpha is None else self.alpha
