"""How the two halves of split clients talk, and what the server keeps for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from polyrank.errors import RecipeError

Wire = Literal["float32", "bf16", "int8", "float64"]
"""The number formats in which activations and gradients travel."""

Adapters = Literal["own", "shared"]
"""Whose LoRA factors the server trains behind the cut."""


@dataclass(frozen=True)
class SplitSettings:
    """What split training asks for beside the cuts themselves; without a cut it has no effect.

    `wire` is the format of activations and gradients: ``float32`` (4 bytes a number), ``bf16``
    (2 bytes, not exact), ``int8`` (activations in 1 byte a number and one scale a token, gradients
    in bf16) or ``float64`` (8 bytes). `adapters` ``own`` gives every client its factors at the
    server; ``shared`` trains one set on the batches of all together, SplitLoRA's way [P]
    (arXiv 2407.00952). `in_flight` is how many microbatches of a client are under way at once.

    `clip` bounds each token's L2 norm before it is sent; None: no bound. `noise` adds Gaussian
    noise of this standard deviation to every number that is sent, after clipping. At levels that
    leave a model useful noise helps little against recovering tokens from activations [S]; no
    differential-privacy guarantee is claimed for either.

    Raises RecipeError for values that cannot be.
    """

    wire: Wire = "bf16"
    adapters: Adapters = "own"
    in_flight: int = 2
    clip: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("wire", get_args(Wire)), ("adapters", get_args(Adapters))):
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"split.{name}: expected one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.in_flight < 1:
            raise RecipeError(
                f"split.in_flight: expected at least 1 microbatch, got {self.in_flight}"
            )
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise RecipeError(
                f"split.clip: expected a finite bound above 0, or none, got {self.clip}"
            )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise RecipeError(
                f"split.noise: expected a standard deviation of at least 0, got {self.noise}"
            )
