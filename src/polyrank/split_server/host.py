"""The split server itself: part of a model, the tails of a round, and the port they listen on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from polyrank.algebra import Adapter, Dense
from polyrank.errors import PolyrankError, SplitServerError
from polyrank.model import LoadedModel, applied
from polyrank.model.swap import with_sums
from polyrank.planning import CutPoint
from polyrank.split_server.interface import ClientStatus, Collected
from polyrank.split_server.settings import SplitServerSettings
from polyrank.training.capacity import return_freed_memory
from polyrank.training.split import Reply, Request, ServerPartJob, ServerParts, Stepped
from polyrank.transport import Limits, codec
from polyrank.transport.remote import Credentials, ServeSettings, SplitServer, new_identity

log = logging.getLogger(__name__)
DAYS = 400.0
"""Days that the certificate is valid: longer than a run; it ends with this process."""
MOST_CREDIT = 64
"""The most frames of a client that may wait here; it has `in_flight` under way, and no more."""
NO_ROOM = (torch.OutOfMemoryError, MemoryError)


class ServerPartHost:
    """Holds the model, and between `open` and `close` the tails of a round's split clients.

    Clients of one cut with adapters of their own are in groups of up to `cohort`, in the order of
    their jobs; clients that share an adapter are in one. What is merged into the base is added once
    for all groups, in the way that gives the same bits as `train_split`. The certificate is made
    here for this process alone, and its key stays here.

    Raises what loading the model raises, and FrameError if the address cannot be bound.
    """

    def __init__(self, settings: SplitServerSettings):
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._model = settings.model.load()
        gather = None if settings.deterministic else settings.gather
        self._server = SplitServer(
            settings.listen,
            new_identity(settings.certified, days=DAYS),
            settings.run,
            ServeSettings(
                gather=gather,
                silence=settings.silence,
                credit=min(settings.split.in_flight, MOST_CREDIT),
                streams=settings.streams,
                turns=settings.deterministic,
            ),
            advertise=settings.address,
        )
        self._attached = ExitStack()
        self._groups: dict[str, _Counted] = {}
        self.address = self._server.start()

    def open(
        self,
        round: int,
        attempt: int,
        jobs: Sequence[ServerPartJob],
        merged: Adapter[Dense],
        tokens: Mapping[str, int],
        seconds: float,
    ) -> dict[str, Credentials | str]:
        """Return how each client reaches its tail, or why it has none; ends what was open."""
        self.close()
        reasons: dict[str, str] = {}
        groups = self._server.call(lambda: self._attach(jobs, merged, reasons))
        self._groups = {client: group for group in groups for client in group.clients}
        if not self._groups:
            return dict(reasons)
        width, wire = self._model.spec.hidden, codec(self._settings.split.wire)
        accesses = self._server.open(
            [(group, group.clients) for group in groups],
            round,
            attempt,
            {client: Limits(tokens[client], width, wire) for client in self._groups},
            seconds,
            patience=self._settings.patience,
        )
        return {**reasons, **accesses}

    def collect(self, client: str) -> Collected:
        """Return what was trained for a client; SplitServerError if it is not finished."""
        group = self._groups.get(client)
        if group is None:
            raise SplitServerError(f"client {client!r}: there is no tail of it in this round")

        def read() -> Collected:
            adapter = group.tails.adapter(client).to(device="cpu")
            return Collected(adapter, group.tails.importance(client))

        try:
            found = self._server.call(read)
        except PolyrankError as error:
            why = self._server.failed(client)
            raise SplitServerError(f"{error}{f' ({why})' if why else ''}") from error
        return replace(found, traffic=self._server.traffic(client))

    def leave(self, client: str) -> None:
        """Give up a client's unfinished tail."""
        if client in self._groups:
            self._server.leave(client)

    def status(self) -> dict[str, ClientStatus]:
        """Return how far each client is."""
        found = {}
        for client, group in self._groups.items():
            traffic = self._server.traffic(client)
            found[client] = ClientStatus(
                connected=traffic.up > 0 and client not in group.left,
                step=group.taken[client],
                steps=group.steps[client],
                up=traffic.up,
                down=traffic.down,
            )
        return found

    def close(self) -> None:
        """End the round; the model is as it was."""
        self._server.close()
        attached, self._attached = self._attached, ExitStack()
        self._server.call(attached.close)
        for group in self._groups.values():
            group.forget()
        self._groups = {}
        return_freed_memory()

    def stop(self) -> None:
        """End the round and close the port."""
        self._server.stop()

    def _attach(
        self, jobs: Sequence[ServerPartJob], merged: Adapter[Dense], reasons: dict[str, str]
    ) -> list[_Counted]:
        """Return the groups, attached to the model; whose tail cannot be made gets a reason."""
        model, split = self._model, self._settings.split
        shared = split.adapters == "shared"
        held = Adapter({s: dense for s, dense in merged.items() if s in model.spec.shapes})
        if shared:
            self._attached.enter_context(applied(model, held))
            beside: Adapter[Dense] = Adapter({})
        else:
            summed, beside = _placed(model, held)
            self._attached.enter_context(with_sums(model, summed))
        groups: list[_Counted] = []
        pending = [list(jobs)] if shared and jobs else _chunks(jobs, self._settings.cohort)
        while pending:
            chosen = pending.pop(0)
            try:
                tails = ServerParts(model, [_with(job, beside) for job in chosen], shared=shared)
                self._attached.enter_context(tails)
            except (PolyrankError, *NO_ROOM) as error:
                if len(chosen) > 1 and not shared:  # It may be the fault of one of them.
                    pending = [[job] for job in chosen] + pending
                    continue
                log.warning("no tail for %s: %s", [job.client for job in chosen], error)
                reasons.update((job.client, f"no tail was made: {error}") for job in chosen)
                continue
            groups.append(_Counted(tails, chosen))
        return groups


class _Counted:
    """A group's tails, and how many steps each client has taken: a `Tail`."""

    def __init__(self, tails: ServerParts, jobs: Sequence[ServerPartJob]):
        self._tails: ServerParts | None = tails
        self.clients = tuple(job.client for job in jobs)
        self.steps = {job.client: job.steps for job in jobs}
        self.taken = dict.fromkeys(self.clients, 0)
        self.left: set[str] = set()

    @property
    def tails(self) -> ServerParts:
        """The tails; SplitServerError once they are forgotten."""
        if self._tails is None:
            raise SplitServerError("split server: the round of these tails has ended")
        return self._tails

    def forget(self) -> None:
        """Let go of the tails, whose memory is then free though the server may know this group."""
        self._tails = None

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | None]:
        """Answer as the tails do."""
        replies = self.tails.answer(requests)
        for reply in replies:
            if isinstance(reply, Stepped):
                self.taken[reply.at.client] = reply.at.step + 1
        return replies

    def leave(self, client: str) -> None:
        """Leave as the tails do."""
        self.left.add(client)
        self.tails.leave(client)


def _chunks(jobs: Sequence[ServerPartJob], cohort: int) -> list[list[ServerPartJob]]:
    """Return the jobs by cut, in their order, in groups of up to `cohort`."""
    by_cut: dict[CutPoint, list[ServerPartJob]] = {}
    for job in jobs:
        by_cut.setdefault(job.cut, []).append(job)
    return [
        group[i : i + cohort] for group in by_cut.values() for i in range(0, len(group), cohort)
    ]


def _placed(model: LoadedModel, merged: Adapter[Dense]) -> tuple[Adapter[Dense], Adapter[Dense]]:
    """Return what the weights may hold for all groups at once, and what each must add in its pass.

    A `Cohort` puts sums into weights of its own precision, and those can be put there once; on
    others it rounds W x + M x once with all that it adds, so that M must be its own.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    same = {s for s in merged if model.module.get_submodule(s).weight.dtype == dtype}
    beside = Adapter({site: dense for site, dense in merged.items() if site not in same})
    return merged.restrict(same), beside.to(dtype=dtype, device=model.device)


def _with(job: ServerPartJob, beside: Adapter[Dense]) -> ServerPartJob:
    mine = Adapter({s: dense for s, dense in beside.items() if s in job.assignment.start})
    return replace(job, assignment=replace(job.assignment, merged=mine))
