"""The point at which a client's model is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyrank.errors import ModelError


@dataclass(frozen=True)
class CutPoint:
    """The blocks that a split client runs itself; the server runs the others.

    The client runs blocks 0 … `lower` − 1 and, in a U-shape, also those from `upper` on with the
    final norm, the output embedding, the labels and the loss. Without `upper` the labels travel.
    """

    lower: int
    upper: int | None = None

    def __post_init__(self) -> None:
        if self.lower < 1 or (self.upper is not None and self.upper <= self.lower):
            raise ModelError(
                f"cut: expected at least 1 block at the client and, in a U-shape, an upper cut "
                f"above the lower one; got {self}"
            )

    @staticmethod
    def of(written: int | Sequence[int]) -> CutPoint:
        """Return the cut as recipes have it: 2, or [2, 6] for a U-shape; ModelError otherwise."""
        cuts = [written] if isinstance(written, int) else [*written]
        if len(cuts) not in (1, 2):
            raise ModelError(
                "cut: expected a number of blocks or, for a U-shape, two, [lower, upper]; got "
                f"{cuts}"
            )
        return CutPoint(*cuts)

    @property
    def written(self) -> int | list[int]:
        """The cut as recipes have it."""
        return self.lower if self.upper is None else [self.lower, self.upper]

    def at_client(self, blocks: int) -> frozenset[int]:
        """Return the client's blocks of a model of so many; ModelError if a cut is outside it."""
        last = self.lower if self.upper is None else self.upper
        if blocks < 2:
            raise ModelError(f"cut: a model of {blocks} block cannot be cut; got {self}")
        if last >= blocks:
            raise ModelError(
                f"cut: expected cuts within 1…{blocks - 1}, as the model has {blocks} blocks and "
                f"each side needs at least one; got {self}"
            )
        return frozenset(range(self.lower)) | frozenset(
            () if self.upper is None else range(self.upper, blocks)
        )

    def at_server(self, blocks: int) -> frozenset[int]:
        """Return the server's blocks, all others."""
        return frozenset(range(blocks)) - self.at_client(blocks)

    def __str__(self) -> str:
        return f"{self.lower}" if self.upper is None else f"{self.lower}–{self.upper}"
