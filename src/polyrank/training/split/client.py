"""One split client at its own end: its progress, its link and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyrank.errors import FrameError
from polyrank.training.job import JobProgress
from polyrank.training.optimizer import ClientOptimizer
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link, PendingReply
from polyrank.training.split.messages import Request, RequestId, Returned, Step, Stepped


class SplitClient:
    """Takes one client through its optimizer steps. If its link or its numbers fail, it gives up.

    `slot` is its place in the cohort of client parts. Raises DataError if it has no examples.
    """

    def __init__(self, slot: int, job: SplitJob, link: Link, parameters: Sequence[nn.Parameter]):
        self.slot, self.job, self.link = slot, job.job, link
        self.progress = JobProgress(job.job)
        self._round, self._attempt = job.round, job.attempt
        self._optimizer = ClientOptimizer(parameters, job.job.local, job.job.steps)
        self._loss = 0.0
        self._squared_norm: float | None = None
        self._factor = 1.0
        self._step_reply: PendingReply | None = None

    @property
    def working(self) -> bool:
        """Whether it has not given up."""
        return self.progress.failure is None

    def request_id(self, step: int, micro: int = 0) -> RequestId:
        """Return the id of one of its requests."""
        return RequestId(self.job.client, self._round, self._attempt, step, micro)

    def begin_step(self) -> None:
        """Reset the loss and the server's norm for a new optimizer step."""
        self._loss, self._squared_norm = 0.0, None

    def send(self, request: Request) -> PendingReply | None:
        """Send a request; None if it cannot be sent, and the client has given up."""
        try:
            return self.link.submit(request)
        except FrameError as error:
            self.give_up(str(error))
            return None

    def receive(
        self, pending: PendingReply | None, id: RequestId, shape: torch.Size
    ) -> Tensor | None:
        """Wait for the states that come back, and add up the numbers that come with them.

        None if the client gives up, or gave up before.
        """
        if pending is None or not self.working:
            return None
        try:
            reply = _checked(pending.result(), id, shape)
        except FrameError as error:
            self.give_up(str(error))
            return None
        self.add_loss(reply.loss or 0.0)
        if reply.squared_norm is not None:
            self._squared_norm = reply.squared_norm
        return reply.states

    def add_loss(self, summed: float) -> None:
        """Add the summed loss of a microbatch."""
        self._loss += summed

    def end_step(self, step: int, *, own: bool) -> bool:
        """Compute the common clip factor; return whether the step can be submitted.

        With `own` factors at the server the norm of their gradient counts, and must have come.
        """
        if own and self._squared_norm is None:
            self.give_up(f"{self.request_id(step)}: the server gave no norm of its gradient")
            return False
        self._optimizer.pull_back()
        norm = float(self._optimizer.norm())
        norm = (norm * norm + (self._squared_norm or 0.0)) ** 0.5
        if not self.progress.advance(step, self._loss, norm):
            self.link.close()
            return False
        self._factor = _clip_factor(self.job.local.clip, norm)
        return True

    def submit_step(self, step: int) -> None:
        """Tell the server to step."""
        self._step_reply = self.send(Step(self.request_id(step), self._factor))

    def take_step(self, step: int) -> bool:
        """Step if the server has stepped; return whether it has."""
        if self._step_reply is None:
            return False
        try:
            reply = self._step_reply.result()
            if not isinstance(reply, Stepped):
                raise FrameError(
                    f"{self.request_id(step)}: expected Stepped, got {type(reply).__name__}"
                )
        except FrameError as error:
            self.give_up(str(error))
            return False
        self._optimizer.scale(self._factor)
        self._optimizer.step(step)
        return True

    def give_up(self, reason: str) -> None:
        """End the client's work; the server discards what it has of it."""
        self.progress.failure = reason
        self.link.close()


def _checked(reply: object, id: RequestId, shape: torch.Size) -> Returned:
    """Return a reply that fits what was sent; FrameError for any other."""
    if not isinstance(reply, Returned):
        raise FrameError(f"{id}: expected states in return, got {type(reply).__name__}")
    if reply.id != id:
        raise FrameError(f"{id}: the answer to another request came, {reply.id}")
    if reply.states.shape != shape:
        raise FrameError(
            f"{id}: expected {tuple(shape)} numbers in return, got {tuple(reply.states.shape)}"
        )
    if not bool(torch.isfinite(reply.states).all()):
        raise FrameError(f"{id}: what the server returned holds NaN or infinity")
    if reply.squared_norm is not None and not reply.squared_norm >= 0:
        raise FrameError(
            f"{id}: expected a squared norm of 0 or more in return, got {reply.squared_norm}"
        )
    return reply


def _clip_factor(clip: float, norm: float) -> float:
    """Return what both ends multiply their gradients by, as torch's clip_grad_norm_ has it."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0
