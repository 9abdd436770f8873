"""The server's end of split training: many clients' server-side parts on one copy of the base."""

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
from polyrank.training.split.passes import Passes, PassResult
from polyrank.training.split.request_sequence import ModelBounds, RequestSequence
from polyrank.training.split.shared import SharedAdapter
from polyrank.training.split.trainer import AdapterTrainer


class ServerParts:
    """Trains the blocks that split clients do not run; attached while the context is entered.

    Without `shared` every client has an adapter of its own here, and all cuts are the same; clients
    whose requests are answered together share one pass. With `shared` all clients train one set of
    factors (SplitLoRA's way), and cuts may differ: a site learns from the clients that do not run
    it themselves. Its gradient is that of the mean loss over all target tokens of the step's union
    batch. The set is clipped by its own norm, and steps once the `Step` of all clients that are
    still at work has come; the gradient that a client gets back is that of its own mean loss. The
    score of a shared site, by the mean loss of the clients that do not run it themselves, counts
    for all of them.

    Besides factors, gradients and optimizers this holds, per client, the replies of the current
    step, and in a U-shape the graphs of passes whose gradients have not come back.

    `answer` belongs to one thread; after it has raised, this object cannot be used any more.
    Between its calls nothing here acts on the model, except that merged sums stay in the weights.

    Raises ModelError if a cut is outside the model, cuts differ without `shared`, or two jobs are
    of one client; SiteError if the server has no site to train, or merged sums differ; and
    RankError if clients of one shared set have other factors or are trained in other ways.
    """

    def __init__(self, model: LoadedModel, jobs: Sequence[ServerPartJob], *, shared: bool = False):
        cuts = {job.cut for job in jobs}
        if not jobs or (len(cuts) > 1 and not shared):
            raise ModelError(
                f"ServerParts: expected clients of one cut, got {sorted(map(str, cuts))}"
            )
        names = [job.client for job in jobs]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ModelError(
                f"ServerParts: expected one job of a client, got several of {twice[:5]}"
            )
        blocks = model.spec.blocks
        at_server = {cut: cut.at_server(blocks) for cut in cuts}
        hosted_blocks = frozenset[int]().union(*at_server.values())
        hosted = side(model, *(Span(block, block + 1) for block in sorted(hosted_blocks)))
        self._sites = {
            cut: frozenset(s.name for s in hosted.spec.sites if s.block in at_server[cut])
            for cut in cuts
        }
        bounds = ModelBounds(
            model.spec.hidden,
            model.module.get_input_embeddings().weight.shape[0],
            model.spec.context,
        )
        self._sequences = {job.client: RequestSequence(job, bounds) for job in jobs}
        merged = _agreed_merged(jobs, self._sites)
        self._trainer: AdapterTrainer = (
            SharedAdapter(hosted, self._sequences, merged, self._sites)
            if shared
            else OwnAdapters(hosted, self._sequences, merged)
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
        """Return the replies in the order of the requests, at most one of each client.

        Requests of one kind and cut are served in one pass, steps of all cuts together. A repeated
        request gets the same reply again and is not applied twice. A request that cannot be served
        is `Refused`: of an unknown client, of another round, not due, not fitting the model, or not
        finite. None stands for the `Step` of a shared set that waits for other clients: nothing was
        done; call again with it when their `Step` comes, or when a client has left.
        """
        answers: dict[int, Reply | None] = {}
        due: dict[tuple[type, CutPoint | None], dict[int, Request]] = {}
        asked: set[str] = set()
        for i, request in enumerate(requests):
            try:
                reply = self._earlier_reply(request)
                if request.id.client in asked:
                    raise FrameError(f"{request.id}: expected one request of a client at a time")
            except FrameError as error:
                answers[i] = Refused(request.id, str(error))
                continue
            asked.add(request.id.client)
            if reply is not None:
                answers[i] = reply
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
        """Discard a client's unfinished work; finished work stays.

        Its gradients stay in the current step of a shared set; a slot of its own steps no more.
        """
        sequence = self._sequences.get(client)
        if sequence is None or sequence.finished:
            return
        sequence.has_left = True
        self._passes[sequence.job.cut].drop(client)

    def adapter(self, client: str) -> Adapter[Delta]:
        """Return what was trained of the client's sites here; FrameError if it is not finished."""
        sequence = self._sequences[client]
        if not sequence.finished:
            raise FrameError(
                f"client {client!r}: the server took {sequence.step} of {sequence.job.steps} steps "
                f"for it{' and it has left' if sequence.has_left else ''}; it has no update"
            )
        whole = self._trainer.cohort.adapter(self._trainer.slot(client))
        return whole.restrict(self._sites[sequence.job.cut])

    def importance(self, client: str) -> dict[str, float]:
        """Return the mean score of the client's sites here, over the steps that were scored."""
        return self._trainer.importance(client)

    def _earlier_reply(self, request: Request) -> Reply | None:
        """Return the reply that a request had before; None if it is new and due."""
        sequence = self._sequences.get(request.id.client)
        if sequence is None:
            raise FrameError(
                f"{request.id}: the server trains nothing for this client; its clients are "
                f"{sorted(self._sequences)[:5]}"
            )
        reply = sequence.repeated(request)
        if reply is None:
            sequence.check(request)
        return reply

    def _cut_of(self, request: Request) -> CutPoint:
        return self._sequences[request.id.client].job.cut

    def _serve(self, cut: CutPoint | None, group: Sequence[Request]) -> Sequence[Reply | None]:
        """Serve requests that are due, of one kind and of one cut, or steps."""
        if cut is None:
            return self._step([request for request in group if isinstance(request, Step)])
        passes = self._passes[cut]
        gradients = [request for request in group if isinstance(request, Gradients)]
        if gradients:
            return self._replies(gradients, passes.backward(gradients), backward=True)
        activations = [request for request in group if isinstance(request, Activations)]
        if cut.upper is None:
            return self._replies(activations, passes.through(activations), backward=True)
        return self._replies(activations, passes.forward(activations), backward=False)

    def _replies(
        self,
        group: Sequence[Activations | Gradients],
        results: Sequence[PassResult],
        *,
        backward: bool,
    ) -> list[Reply]:
        """Return the replies to a pass; with the last backward pass of a step comes the norm."""
        complete = [
            request.id.client
            for request, result in zip(group, results, strict=True)
            if backward and request.last and not isinstance(result, str)
        ]
        norms = self._trainer.norms(complete)
        replies: list[Reply] = []
        for request, result in zip(group, results, strict=True):
            norm = norms.get(request.id.client)
            if isinstance(result, str):
                replies.append(self._diverged(request, result))
            elif norm is not None and not math.isfinite(norm):
                replies.append(self._diverged(request, f"the squared norm {norm} of the gradient"))
            else:
                reply = replace(result, squared_norm=norm)
                self._sequences[request.id.client].note(request, reply)
                replies.append(reply)
        return replies

    def _step(self, group: Sequence[Step]) -> Sequence[Reply | None]:
        if self._trainer.waits_for(group):
            return [None] * len(group)
        replies: list[Reply] = []
        for request, failure in zip(group, self._trainer.step(group), strict=True):
            if failure is not None:
                replies.append(self._diverged(request, failure))
                continue
            self._sequences[request.id.client].note(request, Stepped(request.id))
            replies.append(Stepped(request.id))
        return replies

    def _diverged(self, request: Request, what: str) -> Refused:
        self.leave(request.id.client)
        return Refused(
            request.id,
            f"{request.id}: {what} is not finite; nothing of it was applied. Lower "
            "local.lr, set local.clip, add warm-up, or use a float32 base",
        )


def _agreed_merged(
    jobs: Sequence[ServerPartJob], sites: Mapping[CutPoint, frozenset[str]]
) -> Adapter[Dense]:
    """Return what is merged at the server's sites; SiteError if clients differ."""
    merged: dict[str, Dense] = {}
    for job in jobs:
        merged |= {s: d for s, d in job.assignment.merged.items() if s not in merged}
    for job in jobs:
        own = job.assignment.merged
        for site in sorted(merged.keys() & sites[job.cut]):
            matrix = merged[site].matrix
            if site not in own or not (
                own[site].matrix is matrix or torch.equal(own[site].matrix, matrix)
            ):
                raise SiteError(
                    f"client {job.client!r}: other sums are merged into the base at {site} than "
                    "for other clients; one server holds one base"
                )
    return Adapter(merged)
