"""The server's end of split training: the tails of many clients over one copy of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import torch

from polyrank.algebra import Adapter, Delta, Dense
from polyrank.errors import FrameError, ModelError, SiteError
from polyrank.model import Cut, LoadedModel, Span, side
from polyrank.planning import CutPoint
from polyrank.training.split.job import ServerPartJob
from polyrank.training.split.messages import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    Step,
    Stepped,
)
from polyrank.training.split.own import OwnAdapters
from polyrank.training.split.passes import Passed, Passes
from polyrank.training.split.session import Bounds, Session
from polyrank.training.split.shared import SharedAdapter
from polyrank.training.split.trainer import Trainer


class ServerParts:
    """Trains the blocks that split clients do not run; attached while the context is entered.

    Every client has an adapter of its own here (`shared` false), trained in one pass with those
    whose requests are answered together; all cuts are then the same. Or they share one set
    (SplitLoRA's way), whose gradient is that of the mean loss over all target tokens of the step's
    union batch; cuts may differ then, and a shared site learns from the clients that do not run it
    themselves. The shared set is clipped by its own norm and steps once the `Step` of all clients
    that are still at work is there, and the gradient that a client gets back is that of its own
    mean loss. Of a shared set the union batch's score of a site, by the mean loss of the clients
    that do not run it themselves, counts for all of them.

    Besides factors, gradients and optimizers it holds, per client, the answers of the step under
    way, and in a U-shape the graphs of the passes that have yet to come back.

    `answer` belongs to one thread; if it raises, what is here is of no more use. Between its calls
    nothing here acts on the model, though what is merged into the weights of its sites stays there.

    Raises ModelError if a cut is outside the model, cuts differ without `shared`, or two jobs are
    of one client; SiteError if the server has no site to train, or merged sums differ; and
    RankError if clients of one shared set were not dealt the same, or are trained otherwise.
    """

    def __init__(self, model: LoadedModel, jobs: Sequence[ServerPartJob], *, shared: bool = False):
        cuts = {job.cut for job in jobs}
        if not jobs or (len(cuts) > 1 and not shared):
            raise ModelError(f"Tails: expected clients of one cut, got {sorted(map(str, cuts))}")
        names = [job.client for job in jobs]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ModelError(f"Tails: expected one job of a client, got several of {twice[:5]}")
        blocks = model.spec.blocks
        at_server = {cut: cut.at_server(blocks) for cut in cuts}
        held = frozenset[int]().union(*at_server.values())
        hosted = side(model, *(Span(block, block + 1) for block in sorted(held)))
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
        merged = _agreed_merged(jobs, self._sites)
        self._trainer: Trainer = (
            SharedAdapter(hosted, self._sessions, merged, self._sites)
            if shared
            else OwnAdapters(hosted, self._sessions, merged)
        )
        self._passes = {
            cut: Passes(model, Cut(model, cut.lower, cut.upper), self._trainer) for cut in cuts
        }
        self._trainer.cohort.rest()

    def __enter__(self) -> ServerParts:
        self._trainer.cohort.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._trainer.cohort.__exit__(kind, error, trace)

    def answer(self, requests: Sequence[Request]) -> list[Reply | None]:
        """Return the answers in the order of the requests, at most one of each client.

        Requests of one kind and cut are served in one pass, steps of all cuts together. One that
        was answered before is answered again, and nothing is done. What cannot be served is
        `Refused`: an unknown client, another round, a request that is not due, what does not fit
        the model or is not finite. None is the answer to the `Step` of a shared set that waits for
        other clients: nothing was done, and it is to be asked again together with theirs, or when
        one has left.
        """
        answers: dict[int, Reply | None] = {}
        due: dict[tuple[type, CutPoint | None], dict[int, Request]] = {}
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
        try:
            for (_, cut), group in due.items():
                answers |= zip(group, self._serve(cut, list(group.values())), strict=True)
        finally:
            self._trainer.cohort.rest()
        return [answers[i] for i in range(len(requests))]

    def leave(self, client: str) -> None:
        """Give up the unfinished work of a client, and its passes; finished work stays.

        What it gave to the step of a shared set stays in it; a slot of its own steps no more.
        """
        session = self._sessions.get(client)
        if session is None or session.finished:
            return
        session.gone = True
        self._passes[session.job.cut].drop(client)

    def adapter(self, client: str) -> Adapter[Delta]:
        """Return what was trained of the client's sites here; FrameError if it is not finished."""
        session = self._sessions[client]
        if not session.finished:
            raise FrameError(
                f"client {client!r}: its tail took {session.step} of {session.job.steps} steps"
                f"{' and it has left' if session.gone else ''}; there is no update of it"
            )
        whole = self._trainer.cohort.adapter(self._trainer.slot(client))
        return whole.restrict(self._sites[session.job.cut])

    def importance(self, client: str) -> dict[str, float]:
        """Return the mean score of the client's sites here, over the steps that were scored."""
        return self._trainer.importance(client)

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

    def _cut_of(self, request: Request) -> CutPoint:
        return self._sessions[request.at.client].job.cut

    def _serve(self, cut: CutPoint | None, group: Sequence[Request]) -> Sequence[Reply | None]:
        """Serve requests that are due, of one kind and of one cut, or steps."""
        if cut is None:
            return self._step([one for one in group if isinstance(one, Step)])
        passes = self._passes[cut]
        back = [one for one in group if isinstance(one, Gradients)]
        if back:
            return self._noted(back, passes.backward(back), whole=True)
        sent = [one for one in group if isinstance(one, Activations)]
        if cut.upper is None:
            return self._noted(sent, passes.through(sent), whole=True)
        return self._noted(sent, passes.forward(sent), whole=False)

    def _noted(
        self, group: Sequence[Activations | Gradients], passed: Sequence[Passed], *, whole: bool
    ) -> list[Reply]:
        """Note what was passed; with a step's last gradients (`whole`) comes their norm."""
        sealed = [
            one.at.client
            for one, reply in zip(group, passed, strict=True)
            if whole and one.last and not isinstance(reply, str)
        ]
        norms = self._trainer.norms(sealed)
        replies: list[Reply] = []
        for one, reply in zip(group, passed, strict=True):
            norm = norms.get(one.at.client)
            if isinstance(reply, str):
                replies.append(self._diverged(one, reply))
            elif norm is not None and not math.isfinite(norm):
                replies.append(self._diverged(one, f"the squared norm {norm} of the gradient"))
            else:
                answer = replace(reply, squared_norm=norm)
                self._sessions[one.at.client].note(one, answer)
                replies.append(answer)
        return replies

    def _step(self, group: Sequence[Step]) -> Sequence[Reply | None]:
        if self._trainer.waits_for(group):
            return [None] * len(group)
        replies: list[Reply] = []
        for one, failed in zip(group, self._trainer.step(group), strict=True):
            if failed is not None:
                replies.append(self._diverged(one, failed))
                continue
            self._sessions[one.at.client].note(one, Stepped(one.at))
            replies.append(Stepped(one.at))
        return replies

    def _diverged(self, request: Request, what: str) -> Refused:
        self.leave(request.at.client)
        return Refused(
            request.at,
            f"{request.at}: {what} is not finite; nothing of it was applied. Lower "
            "local.lr, set local.clip, add warm-up, or use a float32 base",
        )


def _agreed_merged(
    jobs: Sequence[ServerPartJob], sites: Mapping[CutPoint, frozenset[str]]
) -> Adapter[Dense]:
    """Return what is merged at the server's sites; SiteError unless clients agree."""
    found: dict[str, Dense] = {}
    for job in jobs:
        found |= {s: d for s, d in job.assignment.merged.items() if s not in found}
    for job in jobs:
        mine = job.assignment.merged
        for site in sorted(found.keys() & sites[job.cut]):
            matrix = found[site].matrix
            if site not in mine or not (
                mine[site].matrix is matrix or torch.equal(mine[site].matrix, matrix)
            ):
                raise SiteError(
                    f"client {job.client!r}: other sums are merged into the base at {site} than "
                    "for other clients; one server holds one base"
                )
    return Adapter(found)
