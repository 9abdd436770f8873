"""The work of one optimizer step: rows, tokens, precision."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.codecs import CODECS
from polyrank.errors import RecipeError


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a client: `accumulation` microbatches of `batch` rows.

    `length` is the tokens of the longest row (all rows count as that long) and `targets` the tokens
    with loss in a row. `moments` are the values that the optimizer keeps per parameter, `proximal`
    says whether FedProx's copy of the start is held too, and `dropout` whether LoRA's inputs are
    dropped out. `itemsize` is the bytes of a number of the base, `factor_itemsize` of the factors.

    With `scored` some steps measure importance: memory is then that of such a step, in which every
    site that a machine holds keeps its output and gradients go down to the first block; operations
    and seconds are those of the others.

    Of split clients: `wire` is the codec of the link, `in_flight` how many microbatches are
    under way at once. `checkpointing` says whether blocks are computed again in the backward pass.

    Raises RecipeError for counts that cannot be.
    """

    batch: int
    length: int
    targets: int
    accumulation: int = 1
    moments: int = 2
    proximal: bool = False
    itemsize: int = 4
    factor_itemsize: int = 4
    wire: str = "bf16"
    in_flight: int = 2
    checkpointing: bool = False
    dropout: bool = False
    scored: bool = False

    def __post_init__(self) -> None:
        least = {
            "batch": 1,
            "length": 1,
            "targets": 1,
            "accumulation": 1,
            "moments": 0,
            "itemsize": 1,
            "factor_itemsize": 1,
            "in_flight": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(
                    f"workload.{name}: expected at least {low}, got {getattr(self, name)}"
                )
        if self.targets > self.length:
            raise RecipeError(
                f"workload.targets: expected at most the {self.length} tokens of a row, got "
                f"{self.targets}"
            )
        if self.wire not in CODECS:
            known = ", ".join(CODECS)
            raise RecipeError(f"workload.wire: expected one of {known}, got {self.wire!r}")

    @property
    def under_way(self) -> int:
        """Microbatches whose activations a split client holds at once."""
        return min(self.in_flight, self.accumulation)
