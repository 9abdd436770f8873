"""The interface of the factors at the server: each client's own, or one set that all share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from polyrank.model import Cohort, Part
from polyrank.training.split.messages import Activations, Step

StepFailure = str | None
"""What was not finite in a step; None if the step was taken."""


class AdapterTrainer(Protocol):
    """Adds up the gradients of passes, and takes optimizer steps."""

    @property
    def cohort(self) -> Cohort:
        """The factors, as adapters of the model."""
        ...

    def slot(self, client: str) -> int:
        """Return the slot of a client's factors in the cohort."""
        ...

    def parts(self, group: Sequence[Activations]) -> list[Part]:
        """Return which slot each row belongs to in a batch of these requests."""
        ...

    def share(self, weight: float) -> float:
        """Return the factor of a client's summed loss in the gradient that is added up."""
        ...

    def sums(self) -> list[Tensor]:
        """Return the tensors that all clients add to, not copied; [] if each has its own."""
        ...

    def norms(self, clients: Sequence[str]) -> dict[str, float]:
        """Complete the gradients of clients whose step is complete; return their squared norms.

        Empty where clients share a set, whose norm is of all of them.
        """
        ...

    def waits_for(self, group: Sequence[Step]) -> list[str]:
        """Return the clients whose `Step` must come before these steps can be taken."""
        ...

    def step(self, group: Sequence[Step]) -> list[StepFailure]:
        """Take the steps of clients whose gradients are complete; score sites where asked for."""
        ...

    def importance(self, client: str) -> dict[str, float]:
        """Return the mean score of a client's sites over its steps that were scored."""
        ...
