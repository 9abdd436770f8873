"""Factors of each client's own at the server, trained in one pass with the other clients'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyrank.algebra import Adapter, Dense
from polyrank.model import Cohort, LoadedModel, Part
from polyrank.training.local import slot_of
from polyrank.training.optimizer import ClientOptimizer
from polyrank.training.scoring import Scored
from polyrank.training.split.messages import Activations, Step
from polyrank.training.split.request_sequence import RequestSequence
from polyrank.training.split.trainer import StepFailure


class OwnAdapters:
    """A slot and an optimizer for each client: an `AdapterTrainer`."""

    def __init__(
        self,
        model: LoadedModel,
        sequences: Mapping[str, RequestSequence],
        merged: Adapter[Dense],
    ):
        self._jobs = {client: sequence.job for client, sequence in sequences.items()}
        jobs = list(self._jobs.values())
        self._slots = {client: k for k, client in enumerate(self._jobs)}
        slots = [slot_of(job.assignment, job.local, job.seed) for job in jobs]
        scored = any(job.scoring.every for job in jobs)
        self.cohort = Cohort(model, slots, merged, scored=scored)
        self._optimizers = [
            ClientOptimizer(self.cohort.parameters(k), job.local, job.steps)
            for k, job in enumerate(jobs)
        ]
        self._importance = {client: Scored() for client in self._jobs}

    def slot(self, client: str) -> int:  # noqa: D102
        return self._slots[client]

    def parts(self, group: Sequence[Activations]) -> list[Part]:  # noqa: D102
        return [
            Part(
                slot=self._slots[request.id.client],
                rows=len(request.lengths),
                length=max(request.lengths),
                draw=(request.id.step, request.id.micro),
                scored=self._scored(request),
            )
            for request in group
        ]

    def share(self, weight: float) -> float:  # noqa: D102
        return weight

    def sums(self) -> list[Tensor]:  # noqa: D102
        return []

    def norms(self, clients: Sequence[str]) -> dict[str, float]:  # noqa: D102
        if not clients:
            return {}
        self.cohort.add_penalties([self._slots[client] for client in clients])
        optimizers = [self._optimizers[self._slots[client]] for client in clients]
        for optimizer in optimizers:
            optimizer.pull_back()
        norms = torch.stack([optimizer.norm() for optimizer in optimizers]).tolist()
        return {client: norm * norm for client, norm in zip(clients, norms, strict=True)}

    def waits_for(self, group: Sequence[Step]) -> list[str]:  # noqa: ARG002, D102
        return []

    def step(self, group: Sequence[Step]) -> list[StepFailure]:  # noqa: D102
        for request in group:
            client, slot = request.id.client, self._slots[request.id.client]
            if self._scored(request):
                metric = self._jobs[client].scoring.metric
                self._importance[client].note(self.cohort.scores(slot, metric))
            self._optimizers[slot].scale(request.factor)
            self._optimizers[slot].step(request.id.step)
            self.cohort.zero_gradients([slot])
        return [None] * len(group)

    def importance(self, client: str) -> dict[str, float]:  # noqa: D102
        return self._importance[client].mean()

    def _scored(self, request: Activations | Step) -> bool:
        return self._jobs[request.id.client].scoring.at(request.id.step)
