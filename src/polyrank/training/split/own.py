"""Factors of each client's own at the server, trained in one pass with those of the others."""

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
from polyrank.training.split.session import Session
from polyrank.training.split.trainer import Outcome


class OwnAdapters:
    """A slot and an optimizer for each client: a `Trainer`."""

    def __init__(self, model: LoadedModel, sessions: Mapping[str, Session], merged: Adapter[Dense]):
        self._jobs = {client: session.job for client, session in sessions.items()}
        jobs = list(self._jobs.values())
        self._slots = {client: k for k, client in enumerate(self._jobs)}
        slots = [slot_of(job.assignment, job.local, job.seed) for job in jobs]
        scored = any(job.scoring.every for job in jobs)
        self.cohort = Cohort(model, slots, merged, scored=scored)
        self._learners = [
            ClientOptimizer(self.cohort.parameters(k), job.local, job.steps)
            for k, job in enumerate(jobs)
        ]
        self._importance = {client: Scored() for client in self._jobs}

    def slot(self, client: str) -> int:  # noqa: D102
        return self._slots[client]

    def parts(self, group: Sequence[Activations]) -> list[Part]:  # noqa: D102
        return [
            Part(
                slot=self._slots[one.at.client],
                rows=len(one.lengths),
                length=max(one.lengths),
                draw=(one.at.step, one.at.micro),
                scored=self._scored(one),
            )
            for one in group
        ]

    def share(self, weight: float) -> float:  # noqa: D102
        return weight

    def sums(self) -> list[Tensor]:  # noqa: D102
        return []

    def norms(self, clients: Sequence[str]) -> dict[str, float]:  # noqa: D102
        if not clients:
            return {}
        self.cohort.add_penalties([self._slots[client] for client in clients])
        learners = [self._learners[self._slots[client]] for client in clients]
        for learner in learners:
            learner.pull_back()
        norms = torch.stack([learner.norm() for learner in learners]).tolist()
        return {client: norm * norm for client, norm in zip(clients, norms, strict=True)}

    def waits_for(self, group: Sequence[Step]) -> list[str]:  # noqa: ARG002, D102
        return []

    def step(self, group: Sequence[Step]) -> list[Outcome]:  # noqa: D102
        for one in group:
            client, slot = one.at.client, self._slots[one.at.client]
            if self._scored(one):
                metric = self._jobs[client].scoring.metric
                self._importance[client].note(self.cohort.scores(slot, metric))
            self._learners[slot].scale(one.factor)
            self._learners[slot].step(one.at.step)
            self.cohort.zero_gradients([slot])
        return [None] * len(group)

    def importance(self, client: str) -> dict[str, float]:  # noqa: D102
        return self._importance[client].mean()

    def _scored(self, request: Activations | Step) -> bool:
        return self._jobs[request.at.client].scoring.at(request.at.step)
