"""One client of the clients' end: its course, its link and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyrank.errors import FrameError
from polyrank.training.job import JobProgress
from polyrank.training.optimizer import ClientOptimizer
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link, Pending
from polyrank.training.split.messages import At, Request, Returned, Step, Stepped


class SplitClient:
    """A client on its way through its steps. If its link or its numbers fail, it gives up.

    `slot` is its place in the cohort of heads. Raises DataError if it has no examples.
    """

    def __init__(self, slot: int, one: SplitJob, link: Link, parameters: Sequence[nn.Parameter]):
        self.slot, self.job, self.link = slot, one.job, link
        self.course = JobProgress(one.job)
        self._round, self._attempt = one.round, one.attempt
        self._learner = ClientOptimizer(parameters, one.job.local, one.job.steps)
        self._loss = 0.0
        self._squared_norm: float | None = None
        self._factor = 1.0
        self._asked: Pending | None = None

    @property
    def working(self) -> bool:
        """Whether it has not given up."""
        return self.course.failure is None

    def at(self, step: int, micro: int = 0) -> At:
        """Return the place of a request of its."""
        return At(self.job.client, self._round, self._attempt, step, micro)

    def begin(self) -> None:
        """Forget the step before."""
        self._loss, self._squared_norm = 0.0, None

    def send(self, request: Request) -> Pending | None:
        """Send a request; None if it cannot be sent, and the client has given up."""
        try:
            return self.link.submit(request)
        except FrameError as error:
            self.give_up(str(error))
            return None

    def take(self, pending: Pending | None, at: At, shape: torch.Size) -> Tensor | None:
        """Wait for the states that come back, and note the numbers that come with them.

        None if the client gives up, or gave up before.
        """
        if pending is None or not self.working:
            return None
        try:
            reply = _checked(pending.result(), at, shape)
        except FrameError as error:
            self.give_up(str(error))
            return None
        self.add_loss(reply.loss or 0.0)
        if reply.squared_norm is not None:
            self._squared_norm = reply.squared_norm
        return reply.states

    def add_loss(self, summed: float) -> None:
        """Note the summed loss of a microbatch."""
        self._loss += summed

    def close_step(self, step: int, *, own: bool) -> bool:
        """Find the common clip factor, and say whether the step can be asked for.

        With `own` factors at the server their norm counts, and must have come.
        """
        if own and self._squared_norm is None:
            self.give_up(f"{self.at(step)}: the server gave no norm of its gradient")
            return False
        self._learner.pull_back()
        norm = float(self._learner.norm())
        norm = (norm * norm + (self._squared_norm or 0.0)) ** 0.5
        if not self.course.advance(step, self._loss, norm):
            self.link.close()
            return False
        self._factor = _factor(self.job.local.clip, norm)
        return True

    def ask(self, step: int) -> None:
        """Tell the server to step."""
        self._asked = self.send(Step(self.at(step), self._factor))

    def step(self, step: int) -> bool:
        """Take the step if the server has taken it."""
        if self._asked is None:
            return False
        try:
            reply = self._asked.result()
            if not isinstance(reply, Stepped):
                raise FrameError(f"{self.at(step)}: expected Stepped, got {type(reply).__name__}")
        except FrameError as error:
            self.give_up(str(error))
            return False
        self._learner.scale(self._factor)
        self._learner.step(step)
        return True

    def give_up(self, reason: str) -> None:
        """End the client's work; what it has at the server is discarded."""
        self.course.failure = reason
        self.link.close()


def _checked(reply: object, at: At, shape: torch.Size) -> Returned:
    """Return what came if it fits what was sent; FrameError otherwise."""
    if not isinstance(reply, Returned):
        raise FrameError(f"{at}: expected states in return, got {type(reply).__name__}")
    if reply.at != at:
        raise FrameError(f"{at}: the answer to another request came, {reply.at}")
    if reply.states.shape != shape:
        raise FrameError(
            f"{at}: expected {tuple(shape)} numbers in return, got {tuple(reply.states.shape)}"
        )
    if not bool(torch.isfinite(reply.states).all()):
        raise FrameError(f"{at}: what the server returned holds NaN or infinity")
    if reply.squared_norm is not None and not reply.squared_norm >= 0:
        raise FrameError(
            f"{at}: expected a squared norm of 0 or more in return, got {reply.squared_norm}"
        )
    return reply


def _factor(clip: float | None, norm: float) -> float:
    """Return what both ends multiply their gradients by, as torch's clip_grad_norm_ has it."""
    return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
