"""Split clients of one process, from their jobs to whole adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter
from polyrank.errors import ModelError
from polyrank.model import LoadedModel, applied
from polyrank.planning import Split
from polyrank.training.course import Job, Trained
from polyrank.training.local import merged_of
from polyrank.training.split.heads import Heads, SplitJob
from polyrank.training.split.link import Link, Tail
from polyrank.training.split.session import TailJob
from polyrank.training.split.settings import SplitSettings
from polyrank.training.split.tails import Tails

Connect = Callable[[Tail], Callable[[str], Link]]
"""Given the server's end, how a client of this name reaches it."""


def train_split(
    model: LoadedModel,
    jobs: Sequence[SplitJob],
    settings: SplitSettings,
    connect: Connect,
    *,
    cohort: int,
    on_step: Callable[[], None] | None = None,
) -> list[Trained]:
    """Train split clients, both ends on one copy of the base; return their results in order.

    Each job's assignment is of the whole model, and so is the adapter that it gives: what was
    trained at the client and at the server together, as if the client had not been cut. Clients of
    one cut take their passes together, up to `cohort` of them. With adapters of their own all have
    the same cut; with a shared one all take their steps together, and what is merged is added for
    all cuts at once.

    Raises what `Heads` and `Tails` raise.
    """
    if not jobs:
        return []
    shared = settings.adapters == "shared"
    with ExitStack() as attached:
        if shared:
            attached.enter_context(applied(model, merged_of([one.job for one in jobs])))
            jobs = [_changed(one, replace(one.job.assignment, merged=Adapter({}))) for one in jobs]
        tails = attached.enter_context(
            Tails(model, [_tail(model, one) for one in jobs], shared=shared)
        )
        link = connect(tails)
        groups = _groups(jobs, cohort)
        heads = [
            attached.enter_context(
                Heads(
                    model,
                    [_head(model, jobs[i]) for i in group],
                    [link(jobs[i].job.client) for i in group],
                    settings,
                )
            )
            for group in groups
        ]
        for step in range(max(one.steps for one in heads)):
            for one in heads:
                one.gradients(step)
            for one in heads:
                one.submit_step(step)
            for _ in [client for one in heads for client in one.complete(step)]:
                if on_step is not None:
                    on_step()
        found: dict[int, Trained] = {}
        for group, one in zip(groups, heads, strict=True):
            found |= zip(group, one.results(), strict=True)
        return [_whole(found[i], tails, jobs[i]) for i in range(len(jobs))]


def _groups(jobs: Sequence[SplitJob], cohort: int) -> list[list[int]]:
    """The jobs that share their passes: by cut, in order, up to so many."""
    by_cut: dict[Split, list[int]] = {}
    for i, one in enumerate(jobs):
        by_cut.setdefault(one.cut, []).append(i)
    return [
        indices[i : i + cohort]
        for indices in by_cut.values()
        for i in range(0, len(indices), cohort)
    ]


def _changed(one: SplitJob, assignment: Assignment) -> SplitJob:
    return replace(one, job=replace(one.job, assignment=assignment))


def _sites(model: LoadedModel, blocks: frozenset[int]) -> frozenset[str]:
    return frozenset(site.name for site in model.spec.sites if site.block in blocks)


def _head(model: LoadedModel, one: SplitJob) -> SplitJob:
    sites = _sites(model, one.cut.at_client(model.spec.blocks))
    return _changed(one, one.job.assignment.only(sites))


def _tail(model: LoadedModel, one: SplitJob) -> TailJob:
    job: Job = one.job
    sites = _sites(model, one.cut.at_server(model.spec.blocks))
    return TailJob(
        client=job.client,
        round=one.round,
        attempt=one.attempt,
        cut=one.cut,
        assignment=job.assignment.only(sites),
        local=job.local,
        seed=job.seed,
        steps=job.steps,
        scoring=job.scoring,
    )


def _whole(trained: Trained, tails: Tails, one: SplitJob) -> Trained:
    """Return a client's result with what the server trained and scored for it."""
    if trained.failure is not None:
        return trained
    adapter = Adapter({**trained.adapter, **tails.adapter(one.job.client)})
    if adapter.keys() != one.job.assignment.start.keys():
        raise ModelError(
            f"client {one.job.client!r}: its head and tail have {len(adapter)} sites, it was dealt "
            f"{len(one.job.assignment.start)}"
        )
    importance = {**trained.importance, **tails.importance(one.job.client)}
    return replace(trained, adapter=adapter, importance=importance)
