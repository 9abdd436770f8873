"""The engine that trains all clients in this process, several of them in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from polyrank.aggregation import Update
from polyrank.data import sizes
from polyrank.errors import ModelError, ResourceError
from polyrank.model import LoadedModel
from polyrank.rounds.engine import CutOf, OnStep
from polyrank.rounds.messages import Failure, TrainTask
from polyrank.training import Job, LocalTraining, Scoring, Trained, train_cohort
from polyrank.training.client_data import ClientWork, everywhere
from polyrank.training.split import Link, ServerPart, SplitJob, SplitSettings, train_split
from polyrank.transport import InProcessLinks


class InProcessEngine:
    """Trains tasks on one copy of the base, `cohort` clients at a time.

    A task with a cut is carried out as both ends of split training, and what passes between them
    goes through a link as bytes. Which clients share a pass depends only on who takes part, so a
    resumed round forms the same cohorts again and gives the same bytes. Every `score_every`-th step
    of a client measures the importance of the weights by `metric`; 0: none does.
    """

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        local: LocalTraining,
        cohort: int,
        split: SplitSettings | None = None,
        score_every: int = 0,
        metric: str = "channel",
    ):
        self.model, self.work, self.local, self.cohort = model, work, local, cohort
        self.split = split or SplitSettings()
        self.scoring = Scoring(score_every, metric)

    def cohorts(self, clients: Sequence[str], cut_of: CutOf = lambda _: None) -> list[list[str]]:
        """Return the clients in groups that are trained together.

        Clients of one cut and of like amounts of work come together, so that few slots wait for the
        longest. Split clients that share one adapter at the server are one group, whatever their
        cuts: they take their steps together.
        """
        whole = [id for id in clients if cut_of(id) is None]
        cut: dict[str, list[str]] = {}
        for id in clients:
            if id not in whole:
                cut.setdefault(str(cut_of(id)), []).append(id)
        groups = self._chunks(whole)
        if self.split.adapters == "shared":
            together = [
                id for key in sorted(cut) for group in self._chunks(cut[key]) for id in group
            ]
            if self.cohort == 1:  # One after the other, in the order of other engines.
                together = [id for key in sorted(cut) for id in sorted(cut[key])]
            return groups + ([together] if together else [])
        return groups + [group for key in sorted(cut) for group in self._chunks(cut[key])]

    def _chunks(self, clients: Sequence[str]) -> list[list[str]]:
        ordered = sorted(clients, key=lambda id: (self._load(id), id))
        return [ordered[i : i + self.cohort] for i in range(0, len(ordered), self.cohort)]

    def _load(self, client: str) -> tuple[int, int]:
        """(number of training rows, their tokens): rows decide how many steps a slot takes."""
        rows = self.work[client].rows["train"]
        return len(rows), sum(size.tokens for size in sizes(rows))

    def run(
        self, groups: Sequence[Sequence[TrainTask]], on_step: OnStep = None
    ) -> Iterator[Update | Failure]:
        """Train cohort after cohort and yield their answers in the order of the tasks."""
        for tasks in groups:
            yield from self.execute(tasks, on_step)

    def close(self) -> None:
        """Do nothing: the engine has nothing of its own to release."""

    def execute(
        self, tasks: Sequence[TrainTask], on_step: OnStep = None
    ) -> Iterator[Update | Failure]:
        """Train one cohort and yield its answers in the order of the tasks.

        A client whose training diverges gives a Failure, and the others go on. Raises ResourceError
        if the device's memory does not hold the cohort.
        """
        jobs = [
            Job(
                t.client,
                everywhere(t.assignment, self.model.spec),
                self.work[t.client].rows["train"],
                self.local,
                t.seed,
                self.scoring,
            )
            for t in tasks
        ]
        started = time.perf_counter()
        try:
            trained = self._train(tasks, jobs, on_step)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"memory: {self.model.device} does not hold {len(jobs)} clients in one pass "
                f"({error}); lower engine.cohort, local.batch or data.max_length"
            ) from error
        seconds = (time.perf_counter() - started) / len(tasks)
        for task, result in zip(tasks, trained, strict=True):
            if result.failure is not None:
                at = task.client, task.round, task.attempt
                yield Failure(*at, result.failure, result.metrics)
                continue
            yield Update(
                client=task.client,
                round=task.round,
                attempt=task.attempt,
                assignment=task.assignment.hash(),
                examples=len(self.work[task.client].rows["train"]),
                adapter=result.adapter.restrict(task.assignment.start).to(device="cpu"),
                metrics={**result.metrics, "seconds": seconds},
                importance=result.importance,
            )

    def _train(
        self, tasks: Sequence[TrainTask], jobs: Sequence[Job], on_step: OnStep
    ) -> list[Trained]:
        cut = [task for task in tasks if task.cut is not None]
        if not cut:
            return train_cohort(self.model, jobs, on_step)
        asked = [
            SplitJob(job, task.cut, task.round, task.attempt)
            for task, job in zip(tasks, jobs, strict=True)
            if task.cut is not None
        ]
        if len(asked) < len(tasks):
            raise ModelError("engine: whole and split clients cannot be trained in one pass")
        longest = max(size.tokens for job in jobs for size in sizes(job.examples))

        def connect(tail: ServerPart) -> Callable[[str], Link]:
            tokens = self.local.batch * longest
            return InProcessLinks(tail, self.split.wire, self.model.spec.hidden, tokens).link

        return train_split(
            self.model, asked, self.split, connect, cohort=self.cohort, on_step=on_step
        )
