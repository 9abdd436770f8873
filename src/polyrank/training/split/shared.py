"""One set of factors at the server for all clients (SplitLoRA, arXiv 2407.00952)."""

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
from polyrank.training.split.request_sequence import RequestSequence
from polyrank.training.split.trainer import StepFailure


class SharedAdapter:
    """One slot and one optimizer for all clients, stepped once for all: an `AdapterTrainer`.

    Until the step, gradients are those of losses summed over target tokens; the step divides them
    by the number of tokens whose gradients have come. `sites` are those behind each cut.

    Raises RankError if clients have other factors behind their cuts, or are trained or scored in
    other ways.
    """

    def __init__(
        self,
        model: LoadedModel,
        sequences: Mapping[str, RequestSequence],
        merged: Adapter[Dense],
        sites: Mapping[CutPoint, frozenset[str]],
    ):
        jobs = [sequence.job for sequence in sequences.values()]
        self._sequences, self._sites = sequences, sites
        self._scoring = jobs[0].scoring
        longest = max(jobs, key=lambda job: job.steps)
        slot = slot_of(_union(jobs, sites), longest.local, longest.seed)
        self.cohort = Cohort(model, [slot], merged, scored=self._scoring.every > 0)
        self._parameters = self.cohort.parameters(0)
        self._optimizer = ClientOptimizer(self._parameters, longest.local, longest.steps)
        self._importance = {client: Scored() for client in sequences}

    def slot(self, client: str) -> int:  # noqa: ARG002, D102
        return 0

    def parts(self, group: Sequence[Activations]) -> list[Part]:  # noqa: D102
        shares = tuple(
            Share(
                len(request.lengths),
                max(request.lengths),
                self._sequences[request.id.client].job.seed,
            )
            for request in group
        )
        id = group[0].id
        return [
            Part(
                slot=0,
                rows=sum(share.rows for share in shares),
                length=max(share.length for share in shares),
                draw=(id.step, id.micro),
                scored=self._scoring.at(id.step),
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
        asked = {request.id.client for request in group}
        return sorted(
            client
            for client, sequence in self._sequences.items()
            if client not in asked and not (sequence.has_left or sequence.finished)
        )

    def step(self, group: Sequence[Step]) -> list[StepFailure]:  # noqa: D102
        step = group[0].id.step
        tokens = {
            client: sequence.targets
            for client, sequence in self._sequences.items()
            if sequence.step == step
        }
        scores = self._scores(tokens) if self._scoring.at(step) else {}
        self._optimizer.scale(1.0 / sum(tokens.values()))
        self.cohort.add_penalties([0])
        self._optimizer.pull_back()
        norm = float(self._optimizer.clip())
        if not math.isfinite(norm):
            return [f"the norm {norm} of the shared adapter's gradient"] * len(group)
        self._optimizer.step(step)
        self.cohort.zero_gradients()
        if scores:
            for request in group:
                client = request.id.client
                own = sorted(self._sites[self._sequences[client].job.cut])
                self._importance[client].note({site: scores[site] for site in own})
        return [None] * len(group)

    def _scores(self, tokens: Mapping[str, float]) -> dict[str, float]:
        """Return the score of each site, by the mean loss of all clients that run it here."""
        sums = self.cohort.scores(0, self._scoring.metric)
        through = dict.fromkeys(sums, 0.0)
        for client, count in tokens.items():
            for site in self._sites[self._sequences[client].job.cut]:
                through[site] += count
        return {site: sums[site] / count for site, count in through.items() if count > 0}

    def importance(self, client: str) -> dict[str, float]:  # noqa: D102
        return self._importance[client].mean()


def _union(jobs: Sequence[ServerPartJob], sites: Mapping[CutPoint, frozenset[str]]) -> Assignment:
    """Return the assignment of the shared set; RankError if clients have other factors."""
    start: dict[str, Delta] = {}
    scale: dict[str, float] = {}
    frozen: dict[str, LowRank | None] = {}
    keep: dict[str, int] = {}
    first = jobs[0].assignment
    for job in jobs:
        _check_same_training(job, jobs[0])
        given = job.assignment
        for site in sorted(sites[job.cut]):
            first_start = start.setdefault(site, given.start[site])
            own = given.start[site]
            fixed = given.frozen.get(site)
            if not (
                _same_numbers(first_start, own)
                and scale.setdefault(site, given.scale[site]) == given.scale[site]
                and _same_numbers(frozen.setdefault(site, fixed), fixed)
            ):
                raise RankError(
                    f"client {job.client!r}: at {site} it has rank {own.rank}, another client "
                    f"rank {first_start.rank} or other factors; clients of one shared adapter need "
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


def _check_same_training(job: ServerPartJob, first: ServerPartJob) -> None:
    def strength(of: ServerPartJob) -> float | None:
        penalty = of.assignment.penalty
        return None if penalty is None else penalty.strength

    for what, own, other in (
        ("its importance is to be measured", job.scoring, first.scoring),
        ("it is to be trained", job.local, first.local),
        ("its factors are to be trained", job.assignment.train, first.assignment.train),
        ("it is to be penalised", strength(job), strength(first)),
    ):
        if own != other:
            raise RankError(
                f"client {job.client!r}: {what} in another way than the clients before it; clients "
                "of one shared adapter are trained, penalised and scored alike"
            )


def _same_numbers(a: Delta | None, b: Delta | None) -> bool:
    """Whether two clients have the same numbers at a site."""
    if a is None or b is None or a is b:
        return a is b
    return Adapter({"": a}).hash() == Adapter({"": b}).hash()
