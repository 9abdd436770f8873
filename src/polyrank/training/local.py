"""A client's local training, many clients in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, Delta, Dense
from polyrank.data.types import Encoded
from polyrank.errors import DataError, SiteError
from polyrank.model import Cohort, LoadedModel, Part, Slot, logits_at, losses_then_gradient
from polyrank.training.batches import assemble, step_groups
from polyrank.training.recipe import LocalTraining


@dataclass(frozen=True)
class Job:
    """What one client is to train: its assignment, its examples, how, and from which seed."""

    client: str
    assignment: Assignment
    examples: Sequence[Encoded]
    local: LocalTraining
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a client's training gave, of the kind of its start (s folded into B), and its numbers.

    `metrics` holds ``loss`` (mean per target token over all steps, each at the factors it met),
    ``first_loss`` and ``last_loss`` (the same of the first and last step), ``tokens`` (input
    tokens without padding), ``target_tokens``, ``steps``, and ``grad_norm`` (mean over the steps,
    before clipping). Losses are the task's alone, the norm is of all that is descended.

    `failure` says why the client gave up, at a loss or a gradient that was not finite; the adapter
    is then that before the step, and there are no metrics.
    """

    adapter: Adapter[Delta]
    metrics: Mapping[str, float]
    failure: str | None = None


def train_cohort(
    model: LoadedModel, jobs: Sequence[Job], on_step: Callable[[], None] | None = None
) -> list[Trained]:
    """Train all jobs together and return their results in the same order.

    Everything but the pass through the base is a client's own: the order of its examples, its
    batches, the mean of its loss, clipping, step count, schedule, optimizer and dropout. So a
    client's result does not depend on the cohort, up to rounding. A client that has finished leaves
    the batch, and so does one whose loss or gradient is not finite. `on_step` is called after every
    optimizer step of every client. The optimizers are dropped on return; the base is not changed.

    What is descended is the mean loss of the step's target tokens, with the assignment's penalty
    and FedProx's term added, all before clipping. Where A is fixed, neither clipping nor optimizer
    nor FedProx see it.

    Raises DataError if a client has no examples, SiteError or RankError if an assignment does not
    fit the model, SiteError also if jobs differ in what is merged or in the kind of their starts.
    """
    for job in jobs:
        if not job.examples:
            raise DataError(f"client {job.client}: it has no training examples; leave it out")
    if not jobs:
        return []
    slots = [
        Slot(
            start=job.assignment.start,
            scale=job.assignment.scale,
            frozen=job.assignment.frozen,
            dropout=job.local.dropout,
            seed=job.seed,
            train=job.assignment.train,
            penalty=job.assignment.penalty,
        )
        for job in jobs
    ]
    with Cohort(model, slots, _merged(jobs)) as cohort:
        clients = [_Client(job, cohort, k) for k, job in enumerate(jobs)]
        for step in range(max(client.steps for client in clients)):
            active = [c for c in clients if step < c.steps and c.failure is None]
            if not active:
                break
            cohort.zero_gradients()
            losses = _accumulate(model, cohort, active, step)
            cohort.add_penalties()
            for client in active:
                client.pull_back()
            norms = [client.clip() for client in active]
            values = torch.stack([*losses, *norms]).tolist()
            for i, client in enumerate(active):
                client.advance(step, loss=values[i], norm=values[len(active) + i])
                if on_step is not None:
                    on_step()
    return [client.result() for client in clients]


def _merged(jobs: Sequence[Job]) -> Adapter[Dense]:
    """Return what is merged into the base of all jobs; SiteError unless it is the same."""
    first = jobs[0].assignment.merged
    for job in jobs[1:]:
        other = job.assignment.merged
        if not (_is_same(first, other) or first.hash() == other.hash()):
            raise SiteError(
                f"clients {jobs[0].client} and {job.client}: other sums are merged into the base "
                "of one than of the other, and a cohort has one base; train them one by one"
            )
    return first


def _is_same(one: Adapter[Dense], other: Adapter[Dense]) -> bool:
    """Whether two adapters hold the very same tensors."""
    return one.keys() == other.keys() and all(
        one[site].matrix is other[site].matrix for site in one
    )


def _accumulate(
    model: LoadedModel, cohort: Cohort, active: Sequence[_Client], step: int
) -> list[Tensor]:
    """Add one optimizer step's gradients to all active slots; return their summed losses.

    A slot's gradient is that of Σ loss / (its target tokens in all microbatches of the step).
    """
    groups = [client.next_group() for client in active]
    weights = [1.0 / sum(row.targets for rows in group for row in rows) for group in groups]
    sums: list[list[Tensor]] = [[] for _ in active]
    for micro in range(max(len(group) for group in groups)):
        members = [i for i, group in enumerate(groups) if micro < len(group)]
        taken = [groups[i][micro] for i in members]
        cohort.route(
            [
                Part(
                    slot=active[i].slot,
                    rows=len(rows),
                    length=max(len(row.input_ids) for row in rows),
                    draw=(step, micro),
                )
                for i, rows in zip(members, taken, strict=True)
            ]
        )
        batch = assemble(
            [row for rows in taken for row in rows], model.tokenizer.pad_token_id, model.device
        )
        counts = [sum(row.targets for row in rows) for rows in taken]
        share = torch.tensor([weights[i] for i in members], dtype=cohort.dtype)
        share = share.repeat_interleave(torch.tensor(counts)).to(model.device)
        logits = logits_at(model, batch.input_ids, batch.positions)
        losses = losses_then_gradient(logits, batch.targets, share)
        logits.backward(logits.detach())
        for i, part in zip(members, losses.split(counts), strict=True):
            sums[i].append(part.sum())
    return [torch.stack(parts).sum() for parts in sums]


class _Client:
    """One job on its way: its optimizer, where it is in its data, and its running sums."""

    def __init__(self, job: Job, cohort: Cohort, slot: int):
        self.job, self.slot = job, slot
        self.steps = job.local.steps_for(len(job.examples))
        self._cohort = cohort
        self._parameters = cohort.parameters(slot)
        self._start = [p.detach().clone() for p in self._parameters] if job.local.proximal else []
        self._optimizer = job.local.make_optimizer(self._parameters)
        self._order: Iterator[list[list[int]]] = step_groups(len(job.examples), job.local, job.seed)
        self._group: list[list[Encoded]] = []
        self._losses: list[float] = []
        self._targets: list[int] = []
        self._norms: list[float] = []
        self._tokens = 0
        self.failure: str | None = None

    def next_group(self) -> list[list[Encoded]]:
        """Return the examples of the next optimizer step, by microbatch."""
        self._group = [[self.job.examples[i] for i in micro] for micro in next(self._order)]
        return self._group

    def pull_back(self) -> None:
        """Add the gradient of FedProx's term, μ(θ − θ_start)."""
        if not self._start:
            return
        for parameter, start in zip(self._parameters, self._start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.job.local.proximal)

    def clip(self) -> Tensor:
        """Return the norm of the gradient, and scale the gradient down to the bound if above it."""
        if self.job.local.clip is None:
            return get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return clip_grad_norm_(self._parameters, self.job.local.clip)

    def advance(self, step: int, loss: float, norm: float) -> None:
        """Take the optimizer step, given the summed loss and the norm of its gradient.

        If one of them is not finite, give up instead.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.failure = (
                f"client {self.job.client}, step {step + 1} of {self.steps}: loss {loss}, gradient "
                f"norm {norm}; nothing of this step was applied. Lower local.lr, set local.clip, "
                "add warm-up, or use a float32 base"
            )
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self.job.local.rate(step, self.steps)
        self._optimizer.step()
        rows = [row for micro in self._group for row in micro]
        self._losses.append(loss)
        self._targets.append(sum(row.targets for row in rows))
        self._norms.append(norm)
        self._tokens += sum(len(row.input_ids) for row in rows)

    def result(self) -> Trained:
        """Return the trained factors and the numbers of the training."""
        factors = self._cohort.adapter(self.slot)
        if self.failure is not None:
            return Trained(factors, {}, self.failure)
        return Trained(
            adapter=factors,
            metrics={
                "loss": sum(self._losses) / sum(self._targets),
                "first_loss": self._losses[0] / self._targets[0],
                "last_loss": self._losses[-1] / self._targets[-1],
                "tokens": float(self._tokens),
                "target_tokens": float(sum(self._targets)),
                "steps": float(self.steps),
                "grad_norm": sum(self._norms) / self.steps,
            },
        )
