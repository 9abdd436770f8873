"""A client's job: its progress through its examples, and the numbers that it reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, Delta
from polyrank.data.types import Encoded
from polyrank.errors import DataError
from polyrank.training.batches import step_groups
from polyrank.training.scoring import NEVER, Scored, Scoring
from polyrank.training.settings import LocalTraining


@dataclass(frozen=True)
class Job:
    """What one client is to train: its assignment, its examples, how, and from which seed.

    `scoring` says in which steps the importance of the weights is measured.
    """

    client: str
    assignment: Assignment
    examples: Sequence[Encoded]
    local: LocalTraining
    seed: int
    scoring: Scoring = NEVER

    @property
    def steps(self) -> int:
        """The optimizer steps that it takes."""
        return self.local.steps_for(len(self.examples))


@dataclass(frozen=True)
class Trained:
    """What a client's training gave, of the kind of its start (s folded into B), and its numbers.

    `metrics` holds ``loss`` (mean per target token over all steps, each at the factors it met),
    ``first_loss`` and ``last_loss`` (the same of the first and last step), ``tokens`` (input
    tokens without padding), ``target_tokens``, ``steps``, and ``grad_norm`` (mean over the steps,
    before clipping). Losses are the task's alone, the norm is of all that is descended. Of a split
    client also ``wire_up`` and ``wire_down``, the bytes that its link carried.

    `importance` is the mean score per site over the steps that were scored, of the mean loss of the
    step without penalties; empty if none was.

    `failure` says why the client gave up, at a loss or a gradient that was not finite; the adapter
    is then that before the step, and of the metrics there are at most the bytes of the link.
    """

    adapter: Adapter[Delta]
    metrics: Mapping[str, float]
    failure: str | None = None
    importance: Mapping[str, float] = field(default_factory=dict)


class JobProgress:
    """One job on its way: where it is in its data, and its running sums.

    Raises DataError if the client has no examples.
    """

    def __init__(self, job: Job):
        if not job.examples:
            raise DataError(f"client {job.client}: it has no training examples; leave it out")
        self.job, self.steps = job, job.steps
        self._order: Iterator[list[list[int]]] = step_groups(len(job.examples), job.local, job.seed)
        self._group: list[list[Encoded]] = []
        self._losses: list[float] = []
        self._targets: list[int] = []
        self._norms: list[float] = []
        self._tokens = 0
        self._scored = Scored()
        self.failure: str | None = None

    def active(self, step: int) -> bool:
        """Whether the client has such a step, and has not given up."""
        return step < self.steps and self.failure is None

    def next_group(self) -> list[list[Encoded]]:
        """Return the examples of the next optimizer step, by microbatch."""
        self._group = [[self.job.examples[i] for i in micro] for micro in next(self._order)]
        return self._group

    @property
    def weight(self) -> float:
        """One over the target tokens of the step: what makes summed losses its mean."""
        return 1.0 / sum(row.targets for micro in self._group for row in micro)

    def scored(self, step: int) -> bool:
        """Whether importance is measured in this step."""
        return self.job.scoring.at(step)

    def note(self, scores: Mapping[str, float]) -> None:
        """Take in the importance per site of a step that was scored."""
        self._scored.note(scores)

    def advance(self, step: int, loss: float, norm: float) -> bool:
        """Note a step's summed loss and the norm of its gradient, and whether to take the step.

        If one of them is not finite, the client gives up.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.failure = (
                f"client {self.job.client}, step {step + 1} of {self.steps}: loss {loss}, gradient "
                f"norm {norm}; nothing of this step was applied. Lower local.lr, set local.clip, "
                "add warm-up, or use a float32 base"
            )
            return False
        rows = [row for micro in self._group for row in micro]
        self._losses.append(loss)
        self._targets.append(sum(row.targets for row in rows))
        self._norms.append(norm)
        self._tokens += sum(len(row.input_ids) for row in rows)
        return True

    def result(self, adapter: Adapter[Delta], **beside: float) -> Trained:
        """Return the trained adapter with the numbers of the training and those given beside."""
        if self.failure is not None:
            return Trained(adapter, beside, self.failure)
        return Trained(
            adapter=adapter,
            metrics={
                "loss": sum(self._losses) / sum(self._targets),
                "first_loss": self._losses[0] / self._targets[0],
                "last_loss": self._losses[-1] / self._targets[-1],
                "tokens": float(self._tokens),
                "target_tokens": float(sum(self._targets)),
                "steps": float(self.steps),
                "grad_norm": sum(self._norms) / self.steps,
                **beside,
            },
            importance=self._scored.mean(),
        )
