"""What the server trains behind the cuts, whether clients have factors of their own or share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from polyrank.model import Cohort, Part
from polyrank.training.split.messages import Activations, Step

Outcome = str | None
"""Of a step: None, it is taken; else what was not finite."""


class Trainer(Protocol):
    """Adds up the gradients of passes, and takes optimizer steps."""

    @property
    def cohort(self) -> Cohort:
        """The factors, as the model meets them."""
        ...

    def slot(self, client: str) -> int:
        """Return where a client's factors are in the cohort."""
        ...

    def parts(self, group: Sequence[Activations]) -> list[Part]:
        """Return whose rows a batch of these requests holds."""
        ...

    def share(self, weight: float) -> float:
        """Return what a client's summed loss is multiplied by in the gradient that is added up."""
        ...

    def sums(self) -> list[Tensor]:
        """Return what all clients' passes add to, as it lies; [] where they add to their own."""
        ...

    def norms(self, clients: Sequence[str]) -> dict[str, float]:
        """Complete the gradients of clients whose step is whole; return their squared norms.

        Empty where the norm is no client's own.
        """
        ...

    def waits_for(self, group: Sequence[Step]) -> list[str]:
        """Return the clients without whose `Step` these steps cannot be taken."""
        ...

    def step(self, group: Sequence[Step]) -> list[Outcome]:
        """Take the step of clients whose gradients are whole, and score it where it is asked."""
        ...

    def importance(self, client: str) -> dict[str, float]:
        """Return the mean score of a client's sites over its steps that were scored."""
        ...
