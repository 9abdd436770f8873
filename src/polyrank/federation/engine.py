"""The engine that trains all clients in this process, several of them in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from polyrank.aggregation import Assignment, Update
from polyrank.data import sizes
from polyrank.errors import ResourceError
from polyrank.federation.round import Failure, Task
from polyrank.federation.work import ClientWork, at_every_site
from polyrank.model import LoadedModel
from polyrank.training import Job, LocalTraining, train_cohort


class InProcess:
    """Trains tasks on one copy of the base, `cohort` clients at a time.

    Which clients share a pass depends only on who takes part, so a resumed round forms the same
    cohorts again and gives the same bytes.
    """

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        local: LocalTraining,
        cohort: int,
    ):
        self.model, self.work, self.local, self.cohort = model, work, local, cohort

    def cohorts(self, clients: Sequence[str]) -> list[list[str]]:
        """Return the clients in groups that are trained together.

        Clients of like amounts of work come together, so that few slots wait for the longest.
        """
        ordered = sorted(clients, key=lambda id: (self._load(id), id))
        return [ordered[i : i + self.cohort] for i in range(0, len(ordered), self.cohort)]

    def _load(self, client: str) -> tuple[int, int]:
        """(number of training rows, their tokens): rows decide how many steps a slot takes."""
        rows = self.work[client].rows["train"]
        return len(rows), sum(size.tokens for size in sizes(rows))

    def execute(
        self, tasks: Sequence[Task], on_step: Callable[[], None] | None = None
    ) -> Iterator[Update | Failure]:
        """Train one cohort and yield its answers in the order of the tasks.

        A client whose training diverges gives a Failure, and the others go on. Raises ResourceError
        if the device's memory does not hold the cohort.
        """
        jobs = [
            Job(
                t.client,
                self._at_every_site(t.assignment),
                self.work[t.client].rows["train"],
                self.local,
                t.seed,
            )
            for t in tasks
        ]
        started = time.perf_counter()
        try:
            trained = train_cohort(self.model, jobs, on_step)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"memory: {self.model.device} does not hold {len(jobs)} clients in one pass "
                f"({error}); lower engine.cohort, local.batch or data.max_length"
            ) from error
        seconds = (time.perf_counter() - started) / len(tasks)
        for task, one in zip(tasks, trained, strict=True):
            if one.failure is not None:
                yield Failure(task.client, task.round, task.attempt, one.failure)
                continue
            yield Update(
                client=task.client,
                round=task.round,
                attempt=task.attempt,
                assignment=task.assignment.hash(),
                examples=len(self.work[task.client].rows["train"]),
                adapter=one.adapter.restrict(task.assignment.start).to(device="cpu"),
                metrics={**one.metrics, "seconds": seconds},
            )

    def _at_every_site(self, assignment: Assignment) -> Assignment:
        """Return the assignment with a zero of rank 0 at the sites that the client leaves alone."""
        start = at_every_site(assignment.start, self.model.spec)
        return replace(
            assignment, start=start, scale={**dict.fromkeys(start, 1.0), **assignment.scale}
        )
