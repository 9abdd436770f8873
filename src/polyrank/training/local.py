"""A client's local training, many clients in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, Dense
from polyrank.errors import SiteError
from polyrank.model import Cohort, LoadedModel, Part, Slot, logits_at, losses_then_gradient
from polyrank.training.batches import assemble
from polyrank.training.job import Job, JobProgress, Trained
from polyrank.training.optimizer import ClientOptimizer
from polyrank.training.settings import LocalTraining


def train_cohort(
    model: LoadedModel, jobs: Sequence[Job], on_step: Callable[[], None] | None = None
) -> list[Trained]:
    """Train all jobs together and return their results in the same order.

    Everything but the pass through the base is a client's own: the order of its examples, its
    batches, the mean of its loss, clipping, step count, schedule, optimizer and dropout. So a
    client's result does not depend on the cohort, up to rounding. A client that has finished leaves
    the batch, and so does one whose loss or gradient is not finite. `on_step` is called after every
    optimizer step of every client. The optimizers are dropped on return; the base is not changed.
    In the steps that a job's scoring asks for, the importance of all sites is measured, which
    changes nothing of what is trained.

    What is descended is the mean loss of the step's target tokens, with the assignment's penalty
    and FedProx's term added, all before clipping. Neither clipping nor optimizer nor FedProx see a
    fixed factor.

    Raises DataError if a client has no examples, SiteError or RankError if an assignment does not
    fit the model, SiteError also if jobs differ in what is merged or in the kind of their starts.
    """
    progress = [JobProgress(job) for job in jobs]
    if not progress:
        return []
    slots = [slot_of(job.assignment, job.local, job.seed) for job in jobs]
    scored = any(job.scoring.every for job in jobs)
    with Cohort(model, slots, merged_of(jobs), scored=scored) as cohort:
        optimizers = [
            ClientOptimizer(cohort.parameters(k), job.local, job.steps)
            for k, job in enumerate(jobs)
        ]
        for step in range(max(job_progress.steps for job_progress in progress)):
            active = [k for k, job_progress in enumerate(progress) if job_progress.active(step)]
            if not active:
                break
            cohort.zero_gradients()
            losses = _accumulate(model, cohort, {k: progress[k] for k in active}, step)
            cohort.add_penalties()
            for k in active:
                optimizers[k].pull_back()
            norms = [optimizers[k].clip() for k in active]
            values = torch.stack([*losses, *norms]).tolist()
            for i, k in enumerate(active):
                if progress[k].advance(step, loss=values[i], norm=values[len(active) + i]):
                    optimizers[k].step(step)
                    if progress[k].scored(step):
                        progress[k].note(cohort.scores(k, jobs[k].scoring.metric))
                if on_step is not None:
                    on_step()
        return [job_progress.result(cohort.adapter(k)) for k, job_progress in enumerate(progress)]


def slot_of(assignment: Assignment, local: LocalTraining, seed: int) -> Slot:
    """Return the place in a cohort of a client with this assignment."""
    return Slot(
        start=assignment.start,
        scale=assignment.scale,
        frozen=assignment.frozen,
        dropout=local.dropout,
        seed=seed,
        train=assignment.train,
        penalty=assignment.penalty,
    )


def merged_of(jobs: Sequence[Job]) -> Adapter[Dense]:
    """Return what all jobs merge into the base; SiteError if they differ."""
    first = jobs[0].assignment.merged
    for job in jobs[1:]:
        other = job.assignment.merged
        if not (_is_same(first, other) or first.hash() == other.hash()):
            raise SiteError(
                f"clients {jobs[0].client} and {job.client}: other sums are merged into the base "
                "of one than of the other, and a cohort has one base; train them one by one"
            )
    return first


def _is_same(first: Adapter[Dense], other: Adapter[Dense]) -> bool:
    """Whether two adapters hold the very same tensors."""
    return first.keys() == other.keys() and all(
        first[site].matrix is other[site].matrix for site in first
    )


def _accumulate(
    model: LoadedModel, cohort: Cohort, active: dict[int, JobProgress], step: int
) -> list[Tensor]:
    """Add one optimizer step's gradients to all active slots; return their summed losses.

    A slot's gradient is that of Σ loss / (its target tokens in all microbatches of the step).
    """
    groups = {k: job_progress.next_group() for k, job_progress in active.items()}
    sums: dict[int, list[Tensor]] = {k: [] for k in active}
    for micro in range(max(len(group) for group in groups.values())):
        members = [k for k, group in groups.items() if micro < len(group)]
        taken = [groups[k][micro] for k in members]
        cohort.route(
            [
                Part(
                    slot=k,
                    rows=len(rows),
                    length=max(len(row.input_ids) for row in rows),
                    draw=(step, micro),
                    scored=active[k].scored(step),
                )
                for k, rows in zip(members, taken, strict=True)
            ]
        )
        batch = assemble(
            [row for rows in taken for row in rows], model.tokenizer.pad_token_id, model.device
        )
        counts = [sum(row.targets for row in rows) for rows in taken]
        share = torch.tensor([active[k].weight for k in members], dtype=cohort.dtype)
        share = share.repeat_interleave(torch.tensor(counts)).to(model.device)
        logits = logits_at(model, batch.input_ids, batch.positions)
        losses = losses_then_gradient(logits, batch.targets, share)
        logits.backward(logits.detach())
        for k, part in zip(members, losses.split(counts), strict=True):
            sums[k].append(part.sum())
    return [torch.stack(parts).sum() for parts in sums.values()]
