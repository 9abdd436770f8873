"""The server's end of split training: the tails of many clients over one copy of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from polyrank.aggregation.types import Assignment, Penalty
from polyrank.algebra import Adapter, Delta, Dense, LowRank
from polyrank.errors import FrameError, ModelError, RankError, SiteError
from polyrank.model import Cohort, Cut, LoadedModel, Part, Span, losses_then_gradient, side
from polyrank.model.routing import Routing
from polyrank.planning import Split
from polyrank.training.learner import Learner
from polyrank.training.local import slot_of
from polyrank.training.scoring import Scored
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    Returned,
    Step,
    Stepped,
)
from polyrank.training.split.packing import Rows
from polyrank.training.split.session import IGNORED, Bounds, Session, TailJob


class Tails:
    """Trains the blocks that split clients do not run; attached while the context is entered.

    Every client has an adapter of its own here (`shared` false), trained in one pass with those
    whose requests are answered together; all cuts are then the same. Or they share one set
    (SplitLoRA's way), whose gradient is that of the mean loss over all target tokens of the step's
    union batch; cuts may differ then, and a shared site learns from the clients that do not run it
    themselves. The shared set is clipped by its own norm and steps once the `Step` of all clients
    that are still at work is there, and the gradient that a client gets back is that of its own
    mean loss. Of a shared set the union batch's score of a site, by the mean loss of the clients
    that do not run it themselves, counts for all of them.

    `answer` belongs to one thread. Between its calls nothing here acts on the model, though what is
    merged into the weights of its sites stays there.

    Raises ModelError if a cut is outside the model or cuts differ without `shared`, SiteError if
    the server has no site to train, or merged sums differ, and RankError if clients of one shared
    set were not dealt the same, or are not scored in the same steps.
    """

    def __init__(self, model: LoadedModel, jobs: Sequence[TailJob], *, shared: bool = False):
        self._model, self._shared = model, shared
        cuts = {job.cut for job in jobs}
        if not jobs or (len(cuts) > 1 and not shared):
            raise ModelError(f"Tails: expected clients of one cut, got {sorted(map(str, cuts))}")
        blocks = model.spec.blocks
        at_server = {cut: cut.at_server(blocks) for cut in cuts}
        held = frozenset[int]().union(*at_server.values())
        hosted = side(model, *(Span(block, block + 1) for block in sorted(held)))
        self._cuts = {cut: Cut(model, cut.lower, cut.upper) for cut in cuts}
        self._sites = {
            cut: frozenset(s.name for s in hosted.spec.sites if s.block in at_server[cut])
            for cut in cuts
        }
        bounds = Bounds(
            model.spec.hidden,
            model.module.get_input_embeddings().weight.shape[0],
            model.spec.context,
        )
        self._sessions = {job.client: Session(job, bounds) for job in jobs}
        merged = _agreed_merged(jobs)
        if shared:
            union, longest = _union(jobs, self._sites), max(jobs, key=lambda job: job.steps)
            slots = [slot_of(union, longest.local, longest.seed)]
            steps = [(longest.local, longest.steps)]
            self._slots = dict.fromkeys(self._sessions, 0)
        else:
            slots = [slot_of(job.assignment, job.local, job.seed) for job in jobs]
            steps = [(job.local, job.steps) for job in jobs]
            self._slots = {job.client: k for k, job in enumerate(jobs)}
        scored = any(job.scoring.every for job in jobs)
        self._cohort = Cohort(hosted, slots, merged, scored=scored)
        self._importance = {client: Scored() for client in self._sessions}
        self._cohort.rest()
        self._learners = [
            Learner(self._cohort.parameters(k), local, count)
            for k, (local, count) in enumerate(steps)
        ]
        self._set = self._cohort.parameters(0) if shared else []
        self._passes: dict[tuple[str, int], _Pass] = {}
        self._weights: dict[str, float] = {}

    def __enter__(self) -> Tails:
        self._cohort.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cohort.__exit__(kind, error, trace)

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """Return the answers in the order of the requests, at most one of each client.

        Requests of one kind and cut are served in one pass, steps of all cuts together. One that
        was answered before is answered again, and nothing is done. What cannot be served is
        `Refused`: an unknown client, another round, a request that is not due, what does not fit
        the model or is not finite.
        """
        answers: dict[int, Reply] = {}
        due: dict[tuple[type, Split | None], dict[int, Request]] = {}
        asked: set[str] = set()
        for i, request in enumerate(requests):
            try:
                found = self._answered(request)
                if request.at.client in asked:
                    raise FrameError(f"{request.at}: expected one request of a client at a time")
            except FrameError as error:
                answers[i] = Refused(request.at, str(error))
                continue
            asked.add(request.at.client)
            if found is not None:
                answers[i] = found
                continue
            cut = None if isinstance(request, Step) else self._cut_of(request)
            due.setdefault((type(request), cut), {})[i] = request
        for group in due.values():
            served = self._serve(list(group.values()))
            answers |= zip(group, served, strict=True)
        self._cohort.rest()
        return [answers[i] for i in range(len(requests))]

    def leave(self, client: str) -> None:
        """Discard what the unfinished work of a client has left here; finished work stays.

        What it gave to the step of a shared set stays in it.
        """
        session = self._sessions.get(client)
        if session is None or session.finished:
            return
        session.gone = True
        self._passes = {key: one for key, one in self._passes.items() if key[0] != client}
        if not self._shared:
            self._cohort.zero_gradients([self._slots[client]])

    def adapter(self, client: str) -> Adapter[Delta]:
        """Return what was trained of the client's sites here; FrameError if it is not finished."""
        session = self._sessions[client]
        if not session.finished:
            raise FrameError(
                f"client {client!r}: its tail took {session.step} of {session.job.steps} steps"
                f"{' and it has left' if session.gone else ''}; there is no update of it"
            )
        whole = self._cohort.adapter(self._slots[client])
        return whole.restrict(self._sites[session.job.cut])

    def importance(self, client: str) -> dict[str, float]:
        """Return the mean score of the client's sites here, over the steps that were scored."""
        return self._importance[client].mean()

    def _answered(self, request: Request) -> Reply | None:
        """Return the answer that a request had before; None if it is new and due."""
        session = self._sessions.get(request.at.client)
        if session is None:
            raise FrameError(
                f"{request.at}: there is no tail for this client; there are "
                f"{sorted(self._sessions)[:5]}"
            )
        found = session.repeated(request)
        if found is None:
            session.check(request)
        return found

    def _serve(self, group: Sequence[Request]) -> list[Reply]:
        """Serve requests that are due, of one kind, and of one cut unless they are steps."""
        if isinstance(group[0], Step):
            return self._step([one for one in group if isinstance(one, Step)])
        if isinstance(group[0], Gradients):
            return self._backward([one for one in group if isinstance(one, Gradients)])
        arrived = [one for one in group if isinstance(one, Activations)]
        cut = self._cut_of(group[0])
        if cut.upper is None:
            return self._forward_and_backward(self._cuts[cut], arrived)
        if self._shared:  # one by one: what is not finite in a pass would reach all of the set
            return [self._forward(self._cuts[cut], [one])[0] for one in arrived]
        return self._forward(self._cuts[cut], arrived)

    def _cut_of(self, request: Request) -> Split:
        return self._sessions[request.at.client].job.cut

    # --- passes ---

    def _route(self, group: Sequence[Activations]) -> Routing:
        lengths = [max(one.lengths) for one in group]
        if self._shared:
            rows, at = sum(len(one.lengths) for one in group), group[0].at
            scored = self._scored(group[0])
            return self._cohort.route([Part(0, rows, max(lengths), (at.step, at.micro), scored)])
        return self._cohort.route(
            [
                Part(
                    self._slots[one.at.client],
                    len(one.lengths),
                    length,
                    (one.at.step, one.at.micro),
                    self._scored(one),
                )
                for one, length in zip(group, lengths, strict=True)
            ]
        )

    def _scored(self, request: Request) -> bool:
        return self._sessions[request.at.client].job.scoring.at(request.at.step)

    def _padded(self, group: Sequence[Activations]) -> tuple[Rows, Tensor]:
        """Return the rows of a batch, and the states in it as a leaf of autograd, B×T×d."""
        rows = Rows([n for one in group for n in one.lengths], self._model.device)
        packed = torch.cat([one.states.detach() for one in group])
        hidden = rows.padded(packed.to(device=self._model.device, dtype=self._model.dtype))
        return rows, hidden.requires_grad_()

    def _forward_and_backward(self, cut: Cut, group: Sequence[Activations]) -> list[Reply]:
        """Run tails with the loss, and back."""
        rows, hidden = self._padded(group)
        before = self._before()
        self._route(group)
        labels = torch.cat([one.labels for one in group if one.labels is not None])
        labels = labels.to(self._model.device)
        wanted = labels != IGNORED
        counts = [int((one.labels != IGNORED).sum()) for one in group if one.labels is not None]
        # A shared set sums over tokens here; the step divides by all of them.
        weights = [1.0 if self._shared else one.weight for one in group]
        share = torch.tensor(weights, dtype=self._cohort.dtype)
        share = share.repeat_interleave(torch.tensor(counts)).to(self._model.device)
        logits = cut.tail(hidden, rows.index[wanted])
        losses = losses_then_gradient(logits, labels[wanted], share)
        logits.backward(logits.detach())
        summed = torch.stack([part.sum() for part in losses.split(counts)]).tolist()
        return self._returned(group, rows, hidden, before, summed)

    def _forward(self, cut: Cut, group: Sequence[Activations]) -> list[Reply]:
        """Run the middles of a U-shape, and keep the graph for the way back."""
        rows, hidden = self._padded(group)
        routing = self._route(group)
        out = rows.packed(cut.middle(hidden)).split([sum(one.lengths) for one in group])
        waiting = {one.at.client: states for one, states in zip(group, out, strict=True)}
        shared = _Pass(list(group), rows, hidden, routing, waiting)
        replies: list[Reply] = []
        for one, states in zip(group, out, strict=True):
            reply: Reply = Returned(one.at, states.detach())
            if not bool(torch.isfinite(states).all()):
                reply = self._diverged(one, "the hidden states at the upper cut are not finite")
            else:
                self._sessions[one.at.client].note(one, reply)
                self._passes[one.at.client, one.at.micro] = shared
            replies.append(reply)
        return replies

    def _backward(self, group: Sequence[Gradients]) -> list[Reply]:
        """Run back through the middles, one pass for those that went forward together."""
        found: dict[int, list[Gradients]] = {}
        for one in group:
            found.setdefault(id(self._passes[one.at.client, one.at.micro]), []).append(one)
        replies: dict[str, Reply] = {}
        for together in found.values():
            kept = self._passes[together[0].at.client, together[0].at.micro]
            for reply in self._backward_together(kept, together):
                replies[reply.at.client] = reply
        return [replies[one.at.client] for one in group]

    def _backward_together(self, kept: _Pass, group: Sequence[Gradients]) -> list[Reply]:
        before = self._before()
        self._cohort.reroute(kept.routing)
        ends = [kept.waiting.pop(one.at.client) for one in group]
        gradients = [one.states.to(end) for one, end in zip(group, ends, strict=True)]
        if self._shared:
            gradients = [
                gradient / self._sessions[one.at.client].weight
                for one, gradient in zip(group, gradients, strict=True)
            ]
        torch.autograd.backward(ends, gradients, retain_graph=bool(kept.waiting))
        for one in group:
            del self._passes[one.at.client, one.at.micro]
        back = {one.at.client: one for one in group}
        places = [back.get(one.at.client) for one in kept.group]
        return self._returned(places, kept.rows, kept.hidden, before, None, kept.group)

    def _returned(
        self,
        group: Sequence[Activations | Gradients | None],
        rows: Rows,
        hidden: Tensor,
        before: Sequence[Tensor],
        losses: Sequence[float] | None,
        sent: Sequence[Activations] | None = None,
    ) -> list[Reply]:
        """Return the gradients of the batch's rows to those who asked, and their norms.

        If something is not finite and the set is shared, its gradient is again as `before`, and
        those who came together are served one by one.
        """
        batch = [one for one in group if isinstance(one, Activations)] if sent is None else sent
        gradient = hidden.grad
        hidden.grad = None
        assert gradient is not None
        parts = rows.packed(gradient).split([sum(one.lengths) for one in batch])
        intact = all(bool(torch.isfinite(g).all()) for g in self._gradients())
        good: list[tuple[Activations | Gradients, Tensor, float | None]] = []
        answers: dict[str, Reply] = {}
        bad: list[tuple[Activations | Gradients, float | None]] = []
        for i, (one, states) in enumerate(zip(group, parts, strict=True)):
            if one is None:
                continue
            states = states * batch[i].weight if self._shared else states
            loss = None if losses is None else losses[i]
            finite = bool(torch.isfinite(states).all()) and math.isfinite(loss or 0.0)
            if intact and finite:
                good.append((one, states, loss))
            else:
                bad.append((one, loss))
        if self._shared and bad:
            for gradient, kept in zip(self._summed(), before, strict=True):
                gradient.copy_(kept)
            if len(batch) > 1:
                return [self._serve([one])[0] for one in batch]
        for one, loss in bad:
            answers[one.at.client] = self._diverged(one, f"loss {loss}, or its gradient,")
        norms = self._sealed([one for one, *_ in good if one.last])
        for one, states, loss in good:
            client = one.at.client
            norm = norms.get(client)
            if norm is not None and not math.isfinite(norm):
                answers[client] = self._diverged(one, f"the squared norm {norm} of the gradient")
                continue
            reply = Returned(one.at, states, loss, norm)
            self._sessions[client].note(one, reply)
            self._weights[client] = self._sessions[client].weight
            answers[client] = reply
        return [answers[one.at.client] for one in group if one is not None]

    def _sealed(self, last: Sequence[Activations | Gradients]) -> dict[str, float]:
        """Complete the gradients of clients whose step is whole; return their squared norms."""
        if self._shared or not last:
            return {}
        clients = [one.at.client for one in last]
        self._cohort.add_penalties([self._slots[client] for client in clients])
        learners = [self._learners[self._slots[client]] for client in clients]
        for learner in learners:
            learner.pull_back()
        norms = torch.stack([learner.norm() for learner in learners]).tolist()
        return {client: norm * norm for client, norm in zip(clients, norms, strict=True)}

    def _diverged(self, request: Activations | Gradients, what: str) -> Refused:
        self.leave(request.at.client)
        return Refused(
            request.at,
            f"{request.at}: {what} is not finite; nothing of it was applied. Lower "
            "local.lr, set local.clip, add warm-up, or use a float32 base",
        )

    def _gradients(self) -> list[Tensor]:
        """Return the gradients of the shared set; none if there is no such set."""
        return [p.grad for p in self._set if p.grad is not None]

    def _summed(self) -> list[Tensor]:
        """Return all that the passes of a shared set add to."""
        return [*self._gradients(), *self._cohort.sums] if self._shared else []

    def _before(self) -> list[Tensor]:
        return [one.clone() for one in self._summed()]

    # --- steps ---

    def _step(self, group: Sequence[Step]) -> list[Reply]:
        if self._shared:
            return self._step_together(group)
        for one in group:
            slot, job = self._slots[one.at.client], self._sessions[one.at.client].job
            if self._scored(one):
                scores = self._cohort.scores(slot, job.scoring.metric)
                self._importance[one.at.client].note(scores)
            self._learners[slot].scale(one.factor)
            self._learners[slot].step(one.at.step)
            self._cohort.zero_gradients([slot])
        return self._stepped(group)

    def _step_together(self, group: Sequence[Step]) -> list[Reply]:
        """Step the shared set, if all who are at work ask for it."""
        asked = {one.at.client for one in group}
        step = group[0].at.step
        at_work = {
            client
            for client, session in self._sessions.items()
            if not (session.gone or session.finished)
        }
        if asked != at_work:
            return [
                Refused(
                    one.at,
                    f"{one.at}: the adapter is shared, and its step waits for "
                    f"{sorted(at_work - asked)[:5]}",
                )
                for one in group
            ]
        learner, scores = self._learners[0], self._union_scores(group)
        learner.scale(1.0 / sum(1.0 / weight for weight in self._weights.values()))
        self._cohort.add_penalties([0])
        learner.pull_back()
        norm = float(learner.clip())
        self._weights.clear()
        if not math.isfinite(norm):
            return [
                self._shared_diverged(self._sessions[one.at.client], one, norm) for one in group
            ]
        learner.step(step)
        for client, of_client in scores.items():
            self._importance[client].note(of_client)
        self._cohort.zero_gradients()
        return self._stepped(group)

    def _union_scores(self, group: Sequence[Step]) -> dict[str, dict[str, float]]:
        """Return the scores of a shared set for each client, at the sites of its tail.

        Sums so far are over tokens; at each site they are divided by the tokens of all clients that
        went through it here.
        """
        if not self._scored(group[0]):
            return {}
        metric = self._sessions[group[0].at.client].job.scoring.metric
        sums = self._cohort.scores(0, metric)
        tokens = dict.fromkeys(sums, 0.0)
        for client, weight in self._weights.items():
            for site in self._sites[self._sessions[client].job.cut]:
                tokens[site] += 1.0 / weight
        return {
            one.at.client: {
                site: sums[site] / tokens[site]
                for site in sorted(self._sites[self._sessions[one.at.client].job.cut])
            }
            for one in group
        }

    def _shared_diverged(self, session: Session, request: Step, norm: float) -> Refused:
        session.gone = True
        return Refused(
            request.at, f"{request.at}: the gradient of the shared adapter has the norm {norm}"
        )

    def _stepped(self, group: Sequence[Step]) -> list[Reply]:
        replies: list[Reply] = []
        for one in group:
            reply = Stepped(one.at)
            self._sessions[one.at.client].note(one, reply)
            replies.append(reply)
        return replies


@dataclass(eq=False)
class _Pass:
    """A pass through the middles that waits for its way back; `waiting` is what went out."""

    group: list[Activations]
    rows: Rows
    hidden: Tensor
    routing: Routing
    waiting: dict[str, Tensor]


def _agreed_merged(jobs: Sequence[TailJob]) -> Adapter[Dense]:
    """Return what is merged at the server's sites; SiteError unless clients agree."""
    found: dict[str, Dense] = {}
    for job in jobs:
        for site, delta in job.assignment.merged.items():
            mine = found.setdefault(site, delta)
            if mine.matrix is not delta.matrix and not torch.equal(mine.matrix, delta.matrix):
                raise SiteError(
                    f"client {job.client!r}: other sums are merged into the base at {site} than "
                    "for the clients before; one server holds one base"
                )
    return Adapter(found)


def _union(jobs: Sequence[TailJob], sites: Mapping[Split, frozenset[str]]) -> Assignment:
    """Return the assignment of the shared set; RankError unless clients were dealt the same."""
    start: dict[str, Delta] = {}
    scale: dict[str, float] = {}
    frozen: dict[str, LowRank | None] = {}
    keep: dict[str, int] = {}
    first = jobs[0].assignment
    for job in jobs:
        if job.scoring != jobs[0].scoring:
            raise RankError(
                f"client {job.client!r}: its importance is to be measured otherwise than of the "
                "clients before; clients of one shared adapter need the same scoring"
            )
        given = job.assignment
        for site in sorted(sites[job.cut]):
            mine = start.setdefault(site, given.start[site])
            other = given.start[site]
            fixed = given.frozen.get(site)
            if not (
                _alike(mine, other)
                and scale.setdefault(site, given.scale[site]) == given.scale[site]
                and _alike(frozen.setdefault(site, fixed), fixed)
            ):
                raise RankError(
                    f"client {job.client!r}: at {site} it was dealt rank {other.rank}, another "
                    f"client rank {mine.rank} or other factors; clients of one shared adapter need "
                    'the same ranks behind the cut. Set split.adapters = "own", or give them one '
                    "LoRA type"
                )
            if given.penalty is not None and site in given.penalty.keep:
                keep[site] = given.penalty.keep[site]
    penalty = Penalty(first.penalty.strength, keep) if first.penalty and keep else None
    return replace(
        first,
        start=Adapter(start),
        scale=scale,
        frozen=Adapter({site: fixed for site, fixed in frozen.items() if fixed is not None}),
        merged=Adapter({}),
        penalty=penalty,
    )


def _alike(one: Delta | None, other: Delta | None) -> bool:
    """Whether two clients were dealt the same numbers at a site."""
    if one is None or other is None or one is other:
        return one is other
    return Adapter({"": one}).hash() == Adapter({"": other}).hash()
