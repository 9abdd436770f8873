"""Training of split clients from jobs to results: all in one process, or one on its own machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from polyrank.algebra import Adapter, Dense
from polyrank.errors import ModelError
from polyrank.model import LoadedModel, applied
from polyrank.planning import CutPoint
from polyrank.training.job import Trained
from polyrank.training.local import merged_of
from polyrank.training.split.client_parts import ClientParts
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link, ServerPart
from polyrank.training.split.server_parts import ServerParts
from polyrank.training.split.settings import SplitSettings

Connect = Callable[[ServerPart], Callable[[str], Link]]
"""Given the server part, returns a function that opens a client's link by name."""


def train_client_part(
    model: LoadedModel,
    job: SplitJob,
    link: Link,
    settings: SplitSettings,
    *,
    on_step: Callable[[], None] | None = None,
) -> Trained:
    """Train one client's own blocks against the server at the other end of the link.

    `model` may hold these blocks alone; of the job's assignment the client's sites are taken. The
    result is of the client's sites: the server has the others. If the client's link or numbers
    fail, its result says so. `on_step` is called after every optimizer step. The link is closed at
    the end, also after an error.

    Raises what `ClientParts` raises.
    """
    try:
        client_parts = ClientParts(model, [job.at_client(model)], [link], settings)
    except BaseException:
        link.close()
        raise
    with client_parts:
        _drive([client_parts], on_step)
        (trained,) = client_parts.results()
        return trained


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

    A job's assignment is of the whole model, and so is the resulting adapter: the factors trained
    at the client and at the server, as if the client had not been cut. Up to `cohort` clients of
    one cut share their passes. With adapters of their own all clients have the same cut; with a
    shared adapter all take their steps together, and merged sums are added for all cuts at once.

    Raises what `ClientParts` and `ServerParts` raise.
    """
    if not jobs:
        return []
    shared = settings.adapters == "shared"
    with ExitStack() as attached:
        if shared:
            attached.enter_context(applied(model, merged_of([job.job for job in jobs])))
            none: Adapter[Dense] = Adapter({})
            jobs = [job.with_assignment(replace(job.job.assignment, merged=none)) for job in jobs]
        server_parts = attached.enter_context(
            ServerParts(model, [job.at_server(model) for job in jobs], shared=shared)
        )
        link = connect(server_parts)
        groups = _groups(jobs, cohort)
        client_parts = [
            attached.enter_context(
                ClientParts(
                    model,
                    [jobs[i].at_client(model) for i in group],
                    [link(jobs[i].job.client) for i in group],
                    settings,
                )
            )
            for group in groups
        ]
        _drive(client_parts, on_step)
        trained: dict[int, Trained] = {}
        for group, parts in zip(groups, client_parts, strict=True):
            trained |= zip(group, parts.results(), strict=True)
        return [_whole(trained[i], server_parts, jobs[i]) for i in range(len(jobs))]


def _drive(groups: Sequence[ClientParts], on_step: Callable[[], None] | None) -> None:
    """Take all optimizer steps, each in all groups at once."""
    for step in range(max(group.steps for group in groups)):
        for group in groups:
            group.gradients(step)
        for group in groups:
            group.submit_step(step)
        for _ in [client for group in groups for client in group.complete(step)]:
            if on_step is not None:
                on_step()


def _groups(jobs: Sequence[SplitJob], cohort: int) -> list[list[int]]:
    """Return the indices of jobs that share passes: of one cut, in order, up to `cohort`."""
    by_cut: dict[CutPoint, list[int]] = {}
    for i, job in enumerate(jobs):
        by_cut.setdefault(job.cut, []).append(i)
    return [
        indices[i : i + cohort]
        for indices in by_cut.values()
        for i in range(0, len(indices), cohort)
    ]


def _whole(trained: Trained, server_parts: ServerParts, job: SplitJob) -> Trained:
    """Return a client's result with the factors and scores of the server's sites."""
    if trained.failure is not None:
        return trained
    adapter = Adapter({**trained.adapter, **server_parts.adapter(job.job.client)})
    if adapter.keys() != job.job.assignment.start.keys():
        raise ModelError(
            f"client {job.job.client!r}: client and server have trained {len(adapter)} sites, its "
            f"assignment has {len(job.job.assignment.start)}"
        )
    importance = {**trained.importance, **server_parts.importance(job.job.client)}
    return replace(trained, adapter=adapter, importance=importance)
