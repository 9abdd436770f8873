"""The split server itself: a part of the model, the clients' server parts, and the gRPC port."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from polyrank.algebra import Adapter, Dense
from polyrank.codecs import codec
from polyrank.errors import PolyrankError, SplitServerError
from polyrank.model import LoadedModel, applied
from polyrank.model.swap import with_sums
from polyrank.planning import CutPoint
from polyrank.split_server.interface import ClientStatus, OpenRound, ServerPartResult
from polyrank.split_server.settings import SplitServerSettings
from polyrank.training.capacity import return_freed_memory
from polyrank.training.split import Reply, Request, ServerPartJob, ServerParts, Stepped
from polyrank.transport import FrameLimits
from polyrank.transport.remote import Credentials, SplitServer, new_identity

log = logging.getLogger(__name__)
DAYS = 400.0
"""Days that the certificate is valid: longer than a run; it ends with this process."""
MOST_CREDIT = 64
"""The most frames of a client that wait here; a client has `in_flight` of them at most."""
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class ServerPartHost:
    """Holds the model, and between `open` and `close` the server parts of a round's clients.

    Clients of one cut with adapters of their own are in groups of up to `cohort`, in the order of
    their jobs; clients that share an adapter are in one group. What is merged into the base is
    added once for all groups, in the way that gives the same bits as `train_split`. The certificate
    is made here for this process alone, and its private key stays here.

    Raises what loading the model raises, and FrameError if the address cannot be bound.
    """

    def __init__(self, settings: SplitServerSettings):
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._model = settings.model.load()
        serving = settings.serving
        self._server = SplitServer(
            settings.listen,
            new_identity(settings.certified, days=DAYS),
            settings.run,
            replace(
                serving,
                gather=None if settings.deterministic else serving.gather,
                turns=settings.deterministic,
                credit=min(settings.split.in_flight, MOST_CREDIT),
            ),
            advertise=settings.address,
        )
        self._attached = ExitStack()
        self._groups: dict[str, _Group] = {}
        self.address = self._server.start()

    def open(self, work: OpenRound) -> dict[str, Credentials | str]:
        """Return each client's credentials, or why it has none; ends the round that is open."""
        self.close()
        refused: dict[str, str] = {}
        groups = self._server.call(lambda: self._attach(work, refused))
        self._groups = {client: group for group in groups for client in group.clients}
        if not self._groups:
            return dict(refused)
        width, wire = self._model.spec.hidden, codec(self._settings.split.wire)
        credentials = self._server.open(
            [(group, group.clients) for group in groups],
            work.round,
            work.attempt,
            {client: FrameLimits(work.tokens[client], width, wire) for client in self._groups},
            work.seconds,
            patience=self._settings.patience,
        )
        return {**refused, **credentials}

    def collect(self, client: str) -> ServerPartResult:
        """Return what was trained for a client; SplitServerError if it is not finished."""
        group = self._groups.get(client)
        if group is None:
            raise SplitServerError(f"client {client!r}: it has no server part in this round")

        def read() -> ServerPartResult:
            adapter = group.parts.adapter(client).to(device="cpu")
            return ServerPartResult(adapter, group.parts.importance(client))

        try:
            result = self._server.call(read)
        except PolyrankError as error:
            reason = self._server.failed(client)
            raise SplitServerError(f"{error}{f' ({reason})' if reason else ''}") from error
        return replace(result, traffic=self._server.traffic(client))

    def leave(self, client: str) -> None:
        """Discard a client's unfinished work and end its stream."""
        if client in self._groups:
            self._server.leave(client)

    def status(self) -> dict[str, ClientStatus]:
        """Return how far each client is."""
        statuses = {}
        for client, group in self._groups.items():
            traffic = self._server.traffic(client)
            statuses[client] = ClientStatus(
                connected=traffic.up > 0 and client not in group.left,
                step=group.taken[client],
                steps=group.steps[client],
                up=traffic.up,
                down=traffic.down,
            )
        return statuses

    def close(self) -> None:
        """End the round; the model is as before it."""
        self._server.close()
        attached, self._attached = self._attached, ExitStack()
        self._server.call(attached.close)
        for group in self._groups.values():
            group.release()
        self._groups = {}
        return_freed_memory()

    def stop(self) -> None:
        """End the round and close the port."""
        self._server.stop()

    def _attach(self, work: OpenRound, refused: dict[str, str]) -> list[_Group]:
        """Return the groups, attached to the model; jobs that cannot be attached get a reason."""
        model, split = self._model, self._settings.split
        shared = split.adapters == "shared"
        merged = work.merged.restrict([s for s in work.merged if s in model.spec.shapes])
        if shared:
            self._attached.enter_context(applied(model, merged))
            in_pass: Adapter[Dense] = Adapter({})
        else:
            in_weights, in_pass = _divide(model, merged)
            self._attached.enter_context(with_sums(model, in_weights))
        groups: list[_Group] = []
        together = shared and work.jobs
        pending = [list(work.jobs)] if together else _chunks(work.jobs, self._settings.cohort)
        while pending:
            jobs = pending.pop(0)
            try:
                parts = ServerParts(model, [_with_merged(j, in_pass) for j in jobs], shared=shared)
                self._attached.enter_context(parts)
            except (PolyrankError, *OUT_OF_MEMORY) as error:
                if len(jobs) > 1 and not shared:  # One of them may be the cause.
                    pending = [[job] for job in jobs] + pending
                    continue
                log.warning("no server part for %s: %s", [job.client for job in jobs], error)
                refused.update((job.client, f"no server part was made: {error}") for job in jobs)
                continue
            groups.append(_Group(parts, jobs))
        return groups


class _Group:
    """Clients that are served together, and how many steps each has taken: a `ServerPart`."""

    def __init__(self, parts: ServerParts, jobs: Sequence[ServerPartJob]):
        self._parts: ServerParts | None = parts
        self.clients = tuple(job.client for job in jobs)
        self.steps = {job.client: job.steps for job in jobs}
        self.taken = dict.fromkeys(self.clients, 0)
        self.left: set[str] = set()

    @property
    def parts(self) -> ServerParts:
        """The server parts; SplitServerError after `release`."""
        if self._parts is None:
            raise SplitServerError("split server: the round of these clients has ended")
        return self._parts

    def release(self) -> None:
        """Free the memory of the server parts, though the gRPC server may keep this group."""
        self._parts = None

    def answer(self, requests: Sequence[Request]) -> Sequence[Reply | None]:
        """Answer as the server parts do, and count steps."""
        replies = self.parts.answer(requests)
        for reply in replies:
            if isinstance(reply, Stepped):
                self.taken[reply.id.client] = reply.id.step + 1
        return replies

    def leave(self, client: str) -> None:
        """Note that the client has left; its unfinished work is discarded."""
        self.left.add(client)
        self.parts.leave(client)


def _chunks(jobs: Sequence[ServerPartJob], cohort: int) -> list[list[ServerPartJob]]:
    """Return the jobs by cut, in their order, in groups of up to `cohort`."""
    by_cut: dict[CutPoint, list[ServerPartJob]] = {}
    for job in jobs:
        by_cut.setdefault(job.cut, []).append(job)
    return [
        group[i : i + cohort] for group in by_cut.values() for i in range(0, len(group), cohort)
    ]


def _divide(model: LoadedModel, merged: Adapter[Dense]) -> tuple[Adapter[Dense], Adapter[Dense]]:
    """Return the sums that go into the weights once for all groups, and those added in each pass.

    A `Cohort` puts sums into weights of its own precision, and those can be put there once. On
    other weights it rounds W x + M x once with all that it adds, so each group must add M itself.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    same = {s for s in merged if model.module.get_submodule(s).weight.dtype == dtype}
    in_pass = Adapter({site: dense for site, dense in merged.items() if site not in same})
    return merged.restrict(same), in_pass.to(dtype=dtype, device=model.device)


def _with_merged(job: ServerPartJob, merged: Adapter[Dense]) -> ServerPartJob:
    own = Adapter({s: dense for s, dense in merged.items() if s in job.assignment.start})
    return replace(job, assignment=replace(job.assignment, merged=own))
