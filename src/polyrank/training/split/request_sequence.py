"""The order of one client's requests at the server: which may come next, and which came before."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyrank.data.collate import IGNORED
from polyrank.errors import FrameError
from polyrank.training.split.job import ServerPartJob
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Reply,
    Request,
    RequestId,
    Step,
    Stepped,
)


@dataclass(frozen=True)
class ModelBounds:
    """The model's width d, its vocabulary and its context, both in tokens."""

    width: int
    vocabulary: int
    context: int


class RequestSequence:
    """Checks one client's requests. A request that raises FrameError changes nothing.

    Within a step microbatches come in their order, from 0 to the one that is marked as the last; in
    a U-shape each comes back as gradients, in the same order. Then comes `Step`. The answered
    requests of this step, and the `Step` before it, may be repeated until the client leaves.
    """

    def __init__(self, job: ServerPartJob, model: ModelBounds):
        self.job, self.step, self.has_left = job, 0, False
        self._model = model
        self._begin(0)
        self._factor: float | None = None

    def _begin(self, step: int) -> None:
        self.step = step
        self.weight = 0.0
        self._sent: list[Activations] = []
        self._answered: dict[tuple[type, int], Reply] = {}
        self._returned = 0
        self._labelled = 0

    @property
    def targets(self) -> float:
        """The step's target tokens whose gradients have come.

        With labels they are counted. In a U-shape they follow from the client's weight, but are no
        more than the tokens whose gradients have come: a client cannot claim tokens that it did not
        send, or, if it leaves, has not sent yet.
        """
        if self.job.cut.upper is None:
            return float(self._labelled)
        back = sum(sum(sent.lengths) for sent in self._sent[: self._returned])
        return min(1.0 / self.weight, float(back)) if back else 0.0

    @property
    def sealed(self) -> bool:
        """Whether all gradients of the step have come."""
        whole = bool(self._sent) and self._sent[-1].last
        return whole and (self.job.cut.upper is None or self._returned == len(self._sent))

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.job.steps

    def repeated(self, request: Request) -> Reply | None:
        """Return the reply to a request that was answered already, or None.

        Raises FrameError if another request of its number was answered, or it is of another round.
        """
        at = request.id
        self._check_round(at)
        if self.has_left:
            raise FrameError(f"{at}: the client has left; its work here is discarded")
        if isinstance(request, Step):
            if at.micro:
                raise FrameError(f"{at}: expected microbatch 0 of a request for a step")
            if at.step != self.step - 1 or self._factor is None:
                return None
            if request.factor != self._factor:
                raise FrameError(
                    f"{at}: this step was taken already, with the factor {self._factor}, and is "
                    f"asked for again with {request.factor}"
                )
            return Stepped(at)
        if at.step != self.step or (type(request), at.micro) not in self._answered:
            return None
        if not _same_sizes(request, self._sent[at.micro]):
            raise FrameError(f"{at}: another request of this number was answered already")
        return self._answered[type(request), at.micro]

    def check(self, request: Request) -> None:
        """Raise FrameError unless this request is the next one and fits the model."""
        if self.finished:
            raise FrameError(f"{request.id}: all {self.job.steps} steps of this round are taken")
        if request.id.step != self.step:
            raise FrameError(f"{request.id}: expected a request of step {self.step}")
        if isinstance(request, Step):
            self._check_step(request)
        elif isinstance(request, Activations):
            self._check_activations(request)
        else:
            self._check_gradients(request)

    def note(self, request: Request, reply: Reply) -> None:
        """Note that a request was answered."""
        if isinstance(request, Step):
            self._factor = request.factor
            self._begin(self.step + 1)
            return
        if isinstance(request, Activations):
            # Its states are not kept: a repetition is recognised by its number and its sizes.
            if request.labels is not None:
                self._labelled += int((request.labels != IGNORED).sum())
            self._sent.append(replace(request, states=request.states[:0].clone(), labels=None))
            self.weight = request.weight
        else:
            self._returned += 1
        self._answered[type(request), request.id.micro] = reply

    def _check_round(self, at: RequestId) -> None:
        expected = (self.job.client, self.job.round, self.job.attempt)
        if (at.client, at.round, at.attempt) != expected:
            raise FrameError(
                f"{at}: expected client {expected[0]!r}, round {expected[1]}, attempt {expected[2]}"
            )

    def _check_step(self, request: Step) -> None:
        if not self.sealed:
            raise FrameError(f"{request.id}: the optimizer step comes after the last microbatch")
        if not 0.0 <= request.factor <= 1.0:
            raise FrameError(
                f"{request.id}: expected a clip factor in [0, 1], got {request.factor}"
            )

    def _check_activations(self, request: Activations) -> None:
        at, model = request.id, self._model
        if self._sent and self._sent[-1].last:
            raise FrameError(f"{at}: microbatch {len(self._sent) - 1} was the last of its step")
        if at.micro != len(self._sent):
            raise FrameError(f"{at}: expected microbatch {len(self._sent)}")
        agreed = self.job.local.accumulation
        if at.micro >= agreed:  # Replies are kept until the step.
            raise FrameError(f"{at}: expected at most {agreed} microbatches in a step")
        if not (math.isfinite(request.weight) and request.weight > 0):
            raise FrameError(f"{at}: expected a loss weight above 0, got {request.weight}")
        if self._sent and request.weight != self.weight:
            raise FrameError(
                f"{at}: expected the step's loss weight {self.weight}, got {request.weight}"
            )
        lengths, most = request.lengths, self.job.local.batch
        if len(lengths) > most:  # A long row among many short ones costs padding.
            raise FrameError(f"{at}: expected at most {most} rows, got {len(lengths)}")
        if not lengths or min(lengths) < 1 or max(lengths) > model.context:
            raise FrameError(
                f"{at}: expected rows of 1…{model.context} tokens, got {list(lengths)[:8]}"
            )
        _check_states(at, "activations", request.states, sum(lengths), model.width)
        tokens = sum(lengths) + sum(sum(sent.lengths) for sent in self._sent)
        if request.last and request.weight * tokens < 1.0:
            raise FrameError(
                f"{at}: expected a loss weight of one over the step's target tokens, of which "
                f"{tokens} tokens cannot hold as many as {request.weight} says"
            )
        self._check_labels(request)

    def _check_labels(self, request: Activations) -> None:
        at, labels = request.id, request.labels
        if (labels is None) != (self.job.cut.upper is not None):
            raise FrameError(
                f"{at}: expected {'no labels' if labels is not None else 'labels'} with the cut at "
                f"{self.job.cut}"
            )
        if labels is None:
            return
        if labels.shape != (sum(request.lengths),) or labels.dtype != torch.int64:
            raise FrameError(
                f"{at}: expected {sum(request.lengths)} labels of torch.int64, got "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self._model.vocabulary))]
        if len(wrong):
            raise FrameError(
                f"{at}: expected labels in 0…{self._model.vocabulary - 1}, or {IGNORED} where "
                f"there is no loss, got {int(wrong[0])}"
            )
        if not bool((labels != IGNORED).any()):
            raise FrameError(f"{at}: expected at least one label")

    def _check_gradients(self, request: Gradients) -> None:
        at = request.id
        if self.job.cut.upper is None:
            raise FrameError(f"{at}: gradients come back in a U-shape only")
        if at.micro != self._returned or at.micro >= len(self._sent):
            raise FrameError(
                f"{at}: expected the gradients of microbatch {self._returned}, after its "
                "activations"
            )
        sent = self._sent[at.micro]
        if request.last != sent.last:
            raise FrameError(
                f"{at}: the activations said that it was {'' if sent.last else 'not '}the last"
            )
        _check_states(at, "gradients", request.states, sum(sent.lengths), self._model.width)


def _same_sizes(again: Activations | Gradients, sent: Activations) -> bool:
    """Whether a repetition has the sizes of what was sent before."""
    if again.states.shape[:1] != (sum(sent.lengths),) or again.last != sent.last:
        return False
    if isinstance(again, Gradients):
        return True
    return (again.weight, again.lengths) == (sent.weight, sent.lengths)


def _check_states(at: RequestId, what: str, states: Tensor, rows: int, width: int) -> None:
    if states.shape != (rows, width) or not states.dtype.is_floating_point:
        raise FrameError(
            f"{at}: expected {what} of {rows}×{width} real numbers, got {tuple(states.shape)} of "
            f"{states.dtype}"
        )
    if not bool(torch.isfinite(states).all()):
        raise FrameError(f"{at}: the {what} hold NaN or infinity; nothing of them was used")
