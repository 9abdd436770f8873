"""One set of factors at the server for all clients, SplitLoRA's way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from polyrank.aggregation.types import Assignment, Penalty
from polyrank.algebra import Adapter, Delta, Dense, LowRank
from polyrank.errors import RankError
from polyrank.model import Cohort, LoadedModel, Part, Share
from polyrank.planning import CutPoint
from polyrank.training.local import slot_of
from polyrank.training.optimizer import ClientOptimizer
from polyrank.training.scoring import Scored
from polyrank.training.split.job import ServerPartJob
from polyrank.training.split.messages import Activations, Step
from polyrank.training.split.session import Session
from polyrank.training.split.trainer import Outcome


class SharedAdapter:
    """One slot and one optimizer for all clients, whose step is taken once for all: a `Trainer`.

    Gradients are those of sums over target tokens until the step, which divides them by all the
    tokens whose gradients are there. `sites` are those behind each cut.

    Raises RankError if clients were not dealt the same behind their cuts, or are to be trained or
    scored in unlike ways.
    """

    def __init__(
        self,
        model: LoadedModel,
        sessions: Mapping[str, Session],
        merged: Adapter[Dense],
        sites: Mapping[CutPoint, frozenset[str]],
    ):
        jobs = [session.job for session in sessions.values()]
        self._sessions, self._sites = sessions, sites
        self._scoring = jobs[0].scoring
        longest = max(jobs, key=lambda job: job.steps)
        slot = slot_of(_union(jobs, sites), longest.local, longest.seed)
        self.cohort = Cohort(model, [slot], merged, scored=self._scoring.every > 0)
        self._parameters = self.cohort.parameters(0)
        self._learner = ClientOptimizer(self._parameters, longest.local, longest.steps)
        self._importance = {client: Scored() for client in sessions}

    def slot(self, client: str) -> int:  # noqa: ARG002, D102
        return 0

    def parts(self, group: Sequence[Activations]) -> list[Part]:  # noqa: D102
        shares = tuple(
            Share(len(one.lengths), max(one.lengths), self._sessions[one.at.client].job.seed)
            for one in group
        )
        at = group[0].at
        return [
            Part(
                slot=0,
                rows=sum(one.rows for one in shares),
                length=max(one.length for one in shares),
                draw=(at.step, at.micro),
                scored=self._scoring.at(at.step),
                shares=shares,
            )
        ]

    def share(self, weight: float) -> float:  # noqa: ARG002, D102
        return 1.0

    def sums(self) -> list[Tensor]:  # noqa: D102
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return [*gradients, *self.cohort.sums]

    def norms(self, clients: Sequence[str]) -> dict[str, float]:  # noqa: ARG002, D102
        return {}

    def waits_for(self, group: Sequence[Step]) -> list[str]:  # noqa: D102
        asked = {one.at.client for one in group}
        return sorted(
            client
            for client, session in self._sessions.items()
            if client not in asked and not (session.gone or session.finished)
        )

    def step(self, group: Sequence[Step]) -> list[Outcome]:  # noqa: D102
        step = group[0].at.step
        tokens = {
            client: session.targets
            for client, session in self._sessions.items()
            if session.step == step
        }
        scores = self._scores(tokens) if self._scoring.at(step) else {}
        self._learner.scale(1.0 / sum(tokens.values()))
        self.cohort.add_penalties([0])
        self._learner.pull_back()
        norm = float(self._learner.clip())
        if not math.isfinite(norm):
            return [f"the norm {norm} of the shared adapter's gradient"] * len(group)
        self._learner.step(step)
        self.cohort.zero_gradients()
        if scores:
            for one in group:
                client = one.at.client
                mine = sorted(self._sites[self._sessions[client].job.cut])
                self._importance[client].note({site: scores[site] for site in mine})
        return [None] * len(group)

    def _scores(self, tokens: Mapping[str, float]) -> dict[str, float]:
        """Return the score of each site, by the mean loss of all who went through it here."""
        sums = self.cohort.scores(0, self._scoring.metric)
        through = dict.fromkeys(sums, 0.0)
        for client, count in tokens.items():
            for site in self._sites[self._sessions[client].job.cut]:
                through[site] += count
        return {site: sums[site] / count for site, count in through.items() if count > 0}

    def importance(self, client: str) -> dict[str, float]:  # noqa: D102
        return self._importance[client].mean()


def _union(jobs: Sequence[ServerPartJob], sites: Mapping[CutPoint, frozenset[str]]) -> Assignment:
    """Return the assignment of the shared set; RankError unless clients were dealt the same."""
    start: dict[str, Delta] = {}
    scale: dict[str, float] = {}
    frozen: dict[str, LowRank | None] = {}
    keep: dict[str, int] = {}
    first = jobs[0].assignment
    for job in jobs:
        _same_way(job, jobs[0])
        given = job.assignment
        for site in sorted(sites[job.cut]):
            mine = start.setdefault(site, given.start[site])
            other = given.start[site]
            fixed = given.frozen.get(site)
            if not (
                _alike(mine, other)
                and scale.setdefault(site, given.scale[site]) == given.scale[site]
                and _alike(frozen.setdefault(site, fixed), fixed)
            ):
                raise RankError(
                    f"client {job.client!r}: at {site} it was dealt rank {other.rank}, another "
                    f"client rank {mine.rank} or other factors; clients of one shared adapter need "
                    'the same ranks behind the cut. Set split.adapters = "own", or give them one '
                    "LoRA type"
                )
            if given.penalty is not None and site in given.penalty.keep:
                keep[site] = given.penalty.keep[site]
    penalty = Penalty(first.penalty.strength, keep) if first.penalty and keep else None
    return replace(
        first,
        start=Adapter(start),
        scale=scale,
        frozen=Adapter({site: fixed for site, fixed in frozen.items() if fixed is not None}),
        merged=Adapter({}),
        penalty=penalty,
    )


def _same_way(job: ServerPartJob, first: ServerPartJob) -> None:
    def strength(one: ServerPartJob) -> float | None:
        penalty = one.assignment.penalty
        return None if penalty is None else penalty.strength

    for what, mine, other in (
        ("its importance is to be measured", job.scoring, first.scoring),
        ("it is to be trained", job.local, first.local),
        ("its factors are to be trained", job.assignment.train, first.assignment.train),
        ("it is to be penalised", strength(job), strength(first)),
    ):
        if mine != other:
            raise RankError(
                f"client {job.client!r}: {what} otherwise than of the clients before; clients of "
                "one shared adapter are trained, penalised and scored alike"
            )


def _alike(one: Delta | None, other: Delta | None) -> bool:
    """Whether two clients were dealt the same numbers at a site."""
    if one is None or other is None or one is other:
        return one is other
    return Adapter({"": one}).hash() == Adapter({"": other}).hash()
