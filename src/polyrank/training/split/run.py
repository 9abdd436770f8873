"""Split clients from their jobs to what they learned: in one process, or one on its own machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from polyrank.algebra import Adapter
from polyrank.errors import ModelError
from polyrank.model import LoadedModel, applied
from polyrank.planning import CutPoint
from polyrank.training.job import Trained
from polyrank.training.local import merged_of
from polyrank.training.split.heads import Heads
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link, ServerPart
from polyrank.training.split.settings import SplitSettings
from polyrank.training.split.tails import ServerParts

Connect = Callable[[ServerPart], Callable[[str], Link]]
"""Given the server's end, how a client of this name reaches it."""


def train_head(
    model: LoadedModel,
    job: SplitJob,
    link: Link,
    settings: SplitSettings,
    *,
    on_step: Callable[[], None] | None = None,
) -> Trained:
    """Train one client's own blocks against the server at the other end of the link.

    `model` may hold these blocks alone; of the job's assignment the client's sites are taken. The
    result is of the client's sites: the server has the others. A client whose link or numbers fail
    says so in its result. `on_step` is called after every optimizer step. The link is closed at the
    end, also of an error.

    Raises what `Heads` raises.
    """
    try:
        made = Heads(model, [job.at_client(model)], [link], settings)
    except BaseException:
        link.close()
        raise
    with made as heads:
        _drive([heads], on_step)
        (trained,) = heads.results()
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

    Each job's assignment is of the whole model, and so is the adapter that it gives: what was
    trained at the client and at the server together, as if the client had not been cut. Clients of
    one cut take their passes together, up to `cohort` of them. With adapters of their own all have
    the same cut; with a shared one all take their steps together, and what is merged is added for
    all cuts at once.

    Raises what `Heads` and `ServerParts` raise.
    """
    if not jobs:
        return []
    shared = settings.adapters == "shared"
    with ExitStack() as attached:
        if shared:
            attached.enter_context(applied(model, merged_of([one.job for one in jobs])))
            jobs = [one.changed(replace(one.job.assignment, merged=Adapter({}))) for one in jobs]
        tails = attached.enter_context(
            ServerParts(model, [one.at_server(model) for one in jobs], shared=shared)
        )
        link = connect(tails)
        groups = _groups(jobs, cohort)
        heads = [
            attached.enter_context(
                Heads(
                    model,
                    [jobs[i].at_client(model) for i in group],
                    [link(jobs[i].job.client) for i in group],
                    settings,
                )
            )
            for group in groups
        ]
        _drive(heads, on_step)
        found: dict[int, Trained] = {}
        for group, one in zip(groups, heads, strict=True):
            found |= zip(group, one.results(), strict=True)
        return [_whole(found[i], tails, jobs[i]) for i in range(len(jobs))]


def _drive(heads: Sequence[Heads], on_step: Callable[[], None] | None) -> None:
    """Take all optimizer steps, those of all groups together."""
    for step in range(max(one.steps for one in heads)):
        for one in heads:
            one.gradients(step)
        for one in heads:
            one.submit_step(step)
        for _ in [client for one in heads for client in one.complete(step)]:
            if on_step is not None:
                on_step()


def _groups(jobs: Sequence[SplitJob], cohort: int) -> list[list[int]]:
    """The jobs that share their passes: by cut, in order, up to so many."""
    by_cut: dict[CutPoint, list[int]] = {}
    for i, one in enumerate(jobs):
        by_cut.setdefault(one.cut, []).append(i)
    return [
        indices[i : i + cohort]
        for indices in by_cut.values()
        for i in range(0, len(indices), cohort)
    ]


def _whole(trained: Trained, tails: ServerParts, one: SplitJob) -> Trained:
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
