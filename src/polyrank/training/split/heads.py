"""The clients' end of split training: their first blocks, and in a U-shape the last ones too."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from polyrank.algebra import Adapter, Dense
from polyrank.errors import FrameError, ModelError
from polyrank.model import Cohort, Cut, LoadedModel, Part, Span, losses_then_gradient, side
from polyrank.model.routing import Routing
from polyrank.planning import Split
from polyrank.seeds import generator
from polyrank.training.batches import TargetBatch, assemble
from polyrank.training.course import Course, Job, Trained
from polyrank.training.learner import Learner
from polyrank.training.local import merged_of, slot_of
from polyrank.training.split.link import Link, Pending
from polyrank.training.split.messages import (
    Activations,
    At,
    Gradients,
    Returned,
    Step,
    Stepped,
)
from polyrank.training.split.packing import Rows
from polyrank.training.split.protect import bounded, noised
from polyrank.training.split.session import IGNORED
from polyrank.training.split.settings import SplitSettings


@dataclass(frozen=True)
class SplitJob:
    """A job whose client runs only some blocks: those that `cut` says, in this round and attempt.

    The job's assignment is of the client's own sites.
    """

    job: Job
    cut: Split
    round: int
    attempt: int = 0


class Heads:
    """Trains the first blocks of clients with one cut; attached while the context is entered.

    K clients of an in-process run share the passes; a client on its own machine is the only one,
    and `model` may then hold its blocks alone. For each optimizer step the caller asks for
    `gradients`, `submit_step` and `complete`, in this order, so that several groups can take their
    steps together. A client whose link or numbers fail gives up, and the others go on.

    Raises ModelError if the cut is outside the model or cuts differ, SiteError if the clients'
    blocks have no site, and DataError if a client has no examples.
    """

    def __init__(
        self,
        model: LoadedModel,
        jobs: Sequence[SplitJob],
        links: Sequence[Link],
        settings: SplitSettings,
    ):
        self._model, self._settings, self._links = model, settings, list(links)
        cuts = {job.cut for job in jobs}
        if len(cuts) != 1:
            raise ModelError(f"Heads: expected clients of one cut, got {sorted(map(str, cuts))}")
        (self._split,) = cuts
        self._split.at_client(model.spec.blocks)
        self._cut = Cut(model, self._split.lower, self._split.upper)
        self._jobs = list(jobs)
        self._courses = [Course(one.job) for one in jobs]
        slots = [slot_of(one.job.assignment, one.job.local, one.job.seed) for one in jobs]
        merged: Adapter[Dense] = merged_of([one.job for one in jobs])
        scored = any(one.job.scoring.every for one in jobs)
        self._cohort = Cohort(client_side(model, self._split), slots, merged, scored=scored)
        self._cohort.rest()
        self._learners = [
            Learner(self._cohort.parameters(k), one.job.local, one.job.steps)
            for k, one in enumerate(jobs)
        ]
        self._active: list[int] = []
        self._factor: dict[int, float] = {}
        self._acks: dict[int, Pending] = {}

    @property
    def steps(self) -> int:
        """The optimizer steps of the client that takes most."""
        return max(course.steps for course in self._courses)

    def __enter__(self) -> Heads:
        self._cohort.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cohort.__exit__(kind, error, trace)
        for link in self._links:
            link.close()

    def gradients(self, step: int) -> None:
        """Run all microbatches of an optimizer step, forward and back."""
        self._active = [k for k, course in enumerate(self._courses) if course.active(step)]
        if not self._active:
            return
        self._cohort.zero_gradients()
        groups = {k: self._courses[k].next_group() for k in self._active}
        losses = dict.fromkeys(self._active, 0.0)
        squares: dict[int, float] = {}
        under_way: deque[_Micro] = deque()
        for micro in range(max(len(group) for group in groups.values())):
            members = {k: group for k, group in groups.items() if micro < len(group)}
            under_way.append(self._send(step, micro, members))
            if len(under_way) >= self._settings.in_flight:
                self._receive(under_way.popleft(), losses, squares)
        while under_way:
            self._receive(under_way.popleft(), losses, squares)
        self._cohort.rest()
        self._cohort.add_penalties(self._active)
        for k in self._working():
            if self._settings.adapters == "own" and k not in squares:
                at = self._at(k, step)
                self._give_up(k, FrameError(f"{at}: the server gave no norm of its gradient"))
                continue
            self._learners[k].pull_back()
            norm = float(self._learners[k].norm())
            norm = (norm * norm + squares.get(k, 0.0)) ** 0.5
            if not self._courses[k].advance(step, losses[k], norm):
                self._links[k].close()
                continue
            self._factor[k] = _factor(self._jobs[k].job.local.clip, norm)
            if self._courses[k].scored(step):
                self._courses[k].note(self._cohort.scores(k, self._jobs[k].job.scoring.metric))

    def submit_step(self, step: int) -> None:
        """Tell the server to step."""
        self._acks = {}
        for k in self._working():
            try:
                self._acks[k] = self._links[k].submit(Step(self._at(k, step), self._factor[k]))
            except FrameError as error:
                self._give_up(k, error)

    def complete(self, step: int) -> list[str]:
        """Take the step of every client whose server has taken it; return their names."""
        taken = []
        for k, ack in self._acks.items():
            try:
                reply = ack.result()
                if not isinstance(reply, Stepped):
                    raise FrameError(
                        f"{self._at(k, step)}: expected Stepped, got {type(reply).__name__}"
                    )
            except FrameError as error:
                self._give_up(k, error)
                continue
            self._learners[k].scale(self._factor[k])
            self._learners[k].step(step)
            taken.append(self._jobs[k].job.client)
        return taken

    def results(self) -> list[Trained]:
        """Return what every client trained of its own sites, with its numbers."""
        found = []
        for k, (course, link) in enumerate(zip(self._courses, self._links, strict=True)):
            traffic = link.traffic
            found.append(
                course.result(
                    self._cohort.adapter(k),
                    wire_up=float(traffic.up),
                    wire_down=float(traffic.down),
                )
            )
        return found

    # --- one microbatch ---

    def _send(self, step: int, micro: int, groups: dict[int, list[list]]) -> _Micro:
        """Run the heads of a microbatch and send what comes out; give up those who cannot send."""
        members = [k for k in groups if self._courses[k].failure is None]
        taken = [groups[k][micro] for k in members]
        if not members:
            return _Micro([], [], [])
        rows = [row for each in taken for row in each]
        lengths = [[len(row.input_ids) for row in each] for each in taken]
        parts = [
            Part(k, len(each), max(each), (step, micro), self._courses[k].scored(step))
            for k, each in zip(members, lengths, strict=True)
        ]
        routing = self._cohort.route(parts)
        batch = assemble(rows, self._model.tokenizer.pad_token_id, self._model.device)
        packing = Rows([n for each in lengths for n in each], self._model.device)
        hidden = packing.packed(self._cut.head(batch.input_ids))
        counts = [sum(each) for each in lengths]
        out = list(self._protected(hidden, members, counts, step, micro).split(counts))
        labels = _labels(batch, packing).split(counts)
        pending: list[Pending | None] = []
        at = [self._at(k, step, micro) for k in members]
        for i, k in enumerate(members):
            message = Activations(
                at[i],
                micro + 1 == len(groups[k]),
                self._courses[k].weight,
                tuple(lengths[i]),
                out[i].detach(),
                labels[i] if self._split.upper is None else None,
            )
            try:
                pending.append(self._links[k].submit(message))
            except FrameError as error:
                pending.append(None)
                self._give_up(k, error)
        last = [micro + 1 == len(groups[k]) for k in members]
        self._cohort.rest()
        return _Micro(members, at, last, out, pending, routing, packing, batch)

    def _protected(
        self, hidden: Tensor, members: Sequence[int], counts: Sequence[int], step: int, micro: int
    ) -> Tensor:
        sent = bounded(hidden, self._settings.clip)
        if not self._settings.noise:
            return sent
        parts = []
        for k, states in zip(members, sent.split(list(counts)), strict=True):
            source = generator(self._jobs[k].job.seed, "noise", step, micro)
            parts.append(noised(states, self._settings.noise, source))
        return torch.cat(parts)

    def _receive(self, micro: _Micro, losses: dict[int, float], squares: dict[int, float]) -> None:
        """Take the answers to a microbatch, and run the heads back."""
        answers = self._answers(micro, micro.pending)
        if self._split.upper is not None:
            answers = self._through_the_end(micro, answers, losses)
        ends, gradients = [], []
        for i, k in enumerate(micro.members):
            reply = answers.get(k)
            if reply is None:
                continue
            if reply.loss is not None:
                losses[k] += reply.loss
            if reply.squared_norm is not None:
                squares[k] = reply.squared_norm
            if micro.out[i].requires_grad:
                ends.append(micro.out[i])
                gradients.append(reply.states.to(micro.out[i]))
        if ends and micro.routing is not None:
            self._cohort.reroute(micro.routing)
            torch.autograd.backward(ends, gradients)
            self._cohort.rest()

    def _through_the_end(
        self, micro: _Micro, answers: dict[int, Returned], losses: dict[int, float]
    ) -> dict[int, Returned]:
        """U-shape: run the last blocks with the loss, and bring the gradients to the server."""
        here = [i for i, k in enumerate(micro.members) if k in answers]
        if not here or micro.packing is None or micro.routing is None or micro.batch is None:
            return {}
        counts = [len(states) for states in micro.out]
        packed = torch.cat(
            [
                answers[k].states.to(device=self._model.device, dtype=self._model.dtype)
                if k in answers
                else states.new_zeros(states.shape)
                for k, states in zip(micro.members, micro.out, strict=True)
            ]
        )
        hidden = micro.packing.padded(packed.detach()).requires_grad_()
        labels = _labels(micro.batch, micro.packing).split(counts)
        targets = [int((each != IGNORED).sum()) for each in labels]
        weights = torch.tensor(
            [self._courses[k].weight if k in answers else 0.0 for k in micro.members],
            dtype=self._cohort.dtype,
        )
        share = weights.repeat_interleave(torch.tensor(targets)).to(self._model.device)
        self._cohort.reroute(micro.routing)
        logits = self._cut.tail(hidden, micro.batch.positions)
        summed = losses_then_gradient(logits, micro.batch.targets, share)
        logits.backward(logits.detach())
        self._cohort.rest()
        back = micro.packing.packed(_gradient(hidden)).split(counts)
        pending: list[Pending | None] = [None] * len(micro.members)
        for i, each in enumerate(summed.split(targets)):
            k = micro.members[i]
            if k not in answers:
                continue
            losses[k] += float(each.sum())
            try:
                message = Gradients(micro.at[i], micro.last[i], back[i])
                pending[i] = self._links[k].submit(message)
            except FrameError as error:
                self._give_up(k, error)
        return self._answers(micro, pending)

    def _answers(self, micro: _Micro, pending: Sequence[Pending | None]) -> dict[int, Returned]:
        """Wait for the answers; those whose answer is none, or does not fit, give up."""
        found: dict[int, Returned] = {}
        for i, (k, one) in enumerate(zip(micro.members, pending, strict=True)):
            if one is None or self._courses[k].failure is not None:
                continue
            try:
                found[k] = _checked(one.result(), micro.at[i], micro.out[i].shape)
            except FrameError as error:
                self._give_up(k, error)
        return found

    # --- who is there ---

    def _working(self) -> list[int]:
        return [k for k in self._active if self._courses[k].failure is None]

    def _give_up(self, k: int, error: FrameError) -> None:
        self._courses[k].failure = str(error)
        self._links[k].close()

    def _at(self, k: int, step: int, micro: int = 0) -> At:
        one = self._jobs[k]
        return At(one.job.client, one.round, one.attempt, step, micro)


@dataclass(eq=False)
class _Micro:
    """A microbatch under way: who is in it, what went out, and what autograd will need."""

    members: list[int]
    at: list[At]
    last: list[bool]
    out: list[Tensor] = field(default_factory=list)
    pending: list[Pending | None] = field(default_factory=list)
    routing: Routing | None = None
    packing: Rows | None = None
    batch: TargetBatch | None = None


def client_side(model: LoadedModel, cut: Split) -> LoadedModel:
    """Return the model with the sites of a client's blocks only."""
    spans = [Span(0, cut.lower)] + ([] if cut.upper is None else [Span(cut.upper)])
    return side(model, *spans)


def _labels(batch: TargetBatch, packing: Rows) -> Tensor:
    """Return per token of the packed rows the token that follows, or `IGNORED`."""
    whole = torch.full((batch.input_ids.numel(),), IGNORED, device=batch.targets.device)
    whole[batch.positions] = batch.targets
    return whole[packing.index]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


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
