"""Settings of split training: wire, adapters at the server, and what clients do to activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from polyrank.codecs import CODECS
from polyrank.settings import OneOf, check


@dataclass(frozen=True)
class SplitSettings:
    """How clients whose type is cut talk to the server, if any is; see
    [privacy](../explanation/privacy.md)."""

    wire: Annotated[str, OneOf(CODECS)] = "bf16"
    """Format of the activations and gradients that travel: 4, 2, 1 or 8 bytes a number; `int8` has
    a scale per token and sends gradients in bf16. `float64` is for a float64 base."""
    adapters: Literal["own", "shared"] = "own"
    """What the server trains behind the cut: `own` factors of each client, or one `shared` set on
    the batches of all together, SplitLoRA's way (arXiv 2407.00952)."""
    in_flight: Annotated[int, Ge(1)] = 2
    """Microbatches of a client that are sent before it waits for a reply."""
    clip: Annotated[float, Gt(0)] | None = None
    """Bound on each token's L2 norm in the activations that are sent; left out, none."""
    noise: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of Gaussian noise on the activations that are sent, after clipping. It
    helps little at levels that leave a model useful; no differential privacy is claimed."""

    def __post_init__(self) -> None:
        check(self, "split")
