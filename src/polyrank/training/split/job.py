"""The work of a split client, and of the server for that client."""

from __future__ import annotations

from dataclasses import dataclass, replace

from polyrank.aggregation.types import Assignment
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint
from polyrank.training.job import Job
from polyrank.training.scoring import NEVER, Scoring
from polyrank.training.settings import LocalTraining


@dataclass(frozen=True)
class SplitJob:
    """A job of a round and attempt whose client runs only some blocks: `cut` says which."""

    job: Job
    cut: CutPoint
    round: int
    attempt: int = 0

    def at_client(self, model: LoadedModel) -> SplitJob:
        """Return the job with the assignment of the client's own sites."""
        return self.with_assignment(self._of(model, self.cut.at_client(model.spec.blocks)))

    def at_server(self, model: LoadedModel) -> ServerPartJob:
        """Return the server's job for this client."""
        return ServerPartJob(
            client=self.job.client,
            round=self.round,
            attempt=self.attempt,
            cut=self.cut,
            assignment=self._of(model, self.cut.at_server(model.spec.blocks)),
            local=self.job.local,
            seed=self.job.seed,
            steps=self.job.steps,
            scoring=self.job.scoring,
        )

    def with_assignment(self, assignment: Assignment) -> SplitJob:
        """Return the job with another assignment."""
        return replace(self, job=replace(self.job, assignment=assignment))

    def _of(self, model: LoadedModel, blocks: frozenset[int]) -> Assignment:
        sites = frozenset(site.name for site in model.spec.sites if site.block in blocks)
        return self.job.assignment.only(sites)


@dataclass(frozen=True)
class ServerPartJob:
    """What the server trains for one client in one round: `assignment` is of the server's sites.

    `seed` is the client's own, for dropout, and `steps` how many optimizer steps there will be.
    `scoring` says in which of them the importance of the server's sites is measured.
    """

    client: str
    round: int
    attempt: int
    cut: CutPoint
    assignment: Assignment
    local: LocalTraining
    seed: int
    steps: int
    scoring: Scoring = NEVER
