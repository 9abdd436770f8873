"""The engine that trains all clients in this process, several of them in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from polyrank.aggregation import Update
from polyrank.federation.round import Task
from polyrank.federation.work import ClientWork
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
        return len(rows), sum(len(row.input_ids) for row in rows)

    def execute(
        self, tasks: Sequence[Task], on_step: Callable[[], None] | None = None
    ) -> Iterator[Update]:
        """Train one cohort and yield its updates in the order of the tasks."""
        jobs = [
            Job(t.client, t.assignment, self.work[t.client].rows["train"], self.local, t.seed)
            for t in tasks
        ]
        started = time.perf_counter()
        trained = train_cohort(self.model, jobs, on_step)
        seconds = (time.perf_counter() - started) / len(tasks)
        for task, one in zip(tasks, trained, strict=True):
            yield Update(
                client=task.client,
                round=task.round,
                attempt=task.attempt,
                assignment=task.assignment.hash(),
                examples=len(self.work[task.client].rows["train"]),
                adapter=one.adapter.to(device="cpu"),
                metrics={**one.metrics, "seconds": seconds},
            )
