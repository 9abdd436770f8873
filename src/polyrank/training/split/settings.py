"""Settings of split training: wire, adapters at the server, and what clients do to activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from polyrank.codecs import CODECS
from polyrank.errors import RecipeError

if TYPE_CHECKING:
    Wire = str
else:
    Wire = Literal[tuple(CODECS)]
"""A codec's name: the format in which activations and gradients travel."""

Adapters = Literal["own", "shared"]
"""The LoRA factors behind the cut: each client's own, or one set that all share."""


@dataclass(frozen=True)
class SplitSettings:
    """How clients that are cut train; without a cut it has no effect.

    `wire` is the codec of activations and gradients (see `polyrank.codecs`). `adapters` ``own``
    gives every client its factors at the server; ``shared`` trains one set on the batches of all
    together, SplitLoRA's way [P] (arXiv 2407.00952). `in_flight` is how many microbatches of a
    client are sent before it waits for a reply.

    `clip` bounds each token's L2 norm before it is sent; None: no bound. `noise` adds Gaussian
    noise of this standard deviation to every number that is sent, after clipping. At levels that
    leave a model useful noise helps little against recovering tokens from activations [S]; no
    differential-privacy guarantee is claimed for either.

    Raises RecipeError for values out of range.
    """

    wire: Wire = "bf16"
    adapters: Adapters = "own"
    in_flight: int = 2
    clip: float | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("wire", tuple(CODECS)), ("adapters", get_args(Adapters))):
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
