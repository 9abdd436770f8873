"""The clients' end of split training: their first blocks, and in a U-shape the last ones too."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType

from polyrank.errors import ModelError
from polyrank.model import Cohort, Cut, LoadedModel, Span, side
from polyrank.training.job import Trained
from polyrank.training.local import merged_of, slot_of
from polyrank.training.split.client import SplitClient
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link
from polyrank.training.split.microbatch import InFlightBatch, Microbatches
from polyrank.training.split.settings import SplitSettings


class ClientParts:
    """Trains the clients' own blocks, all of one cut; attached while the context is entered.

    The jobs' assignments are of the clients' own sites. K clients of an in-process run share the
    passes; a client on its own machine is the only one, and `model` may then hold its blocks alone.
    For each optimizer step the caller calls `gradients`, `submit_step` and `complete`, in this
    order, so that several groups can take their steps together. A client whose link or numbers fail
    gives up, and the others go on. The links are closed on leaving the context.

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
        self._settings, self._links = settings, list(links)
        cuts = {job.cut for job in jobs}
        if len(cuts) != 1:
            raise ModelError(
                f"ClientParts: expected clients of one cut, got {sorted(map(str, cuts))}"
            )
        (cut_point,) = cuts
        cut_point.at_client(model.spec.blocks)
        cut = Cut(model, cut_point.lower, cut_point.upper)
        last = [] if cut_point.upper is None else [Span(cut_point.upper)]
        slots = [slot_of(job.job.assignment, job.job.local, job.job.seed) for job in jobs]
        merged = merged_of([job.job for job in jobs])
        scored = any(job.job.scoring.every for job in jobs)
        own = side(model, Span(0, cut_point.lower), *last)
        self._cohort = Cohort(own, slots, merged, scored=scored)
        self._cohort.rest()
        self._clients = [
            SplitClient(k, job, link, self._cohort.parameters(k))
            for k, (job, link) in enumerate(zip(jobs, self._links, strict=True))
        ]
        self._microbatches = Microbatches(model, cut, self._cohort, settings)
        self._stepping: list[SplitClient] = []

    @property
    def steps(self) -> int:
        """The optimizer steps of the client that takes most."""
        return max(client.progress.steps for client in self._clients)

    def __enter__(self) -> ClientParts:
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
        self._stepping = []
        active = [client for client in self._clients if client.progress.active(step)]
        if not active:
            return
        self._cohort.zero_gradients()
        for client in active:
            client.begin_step()
        groups = {client: client.progress.next_group() for client in active}
        in_flight: deque[InFlightBatch] = deque()
        for micro in range(max(len(group) for group in groups.values())):
            here = {client: group for client, group in groups.items() if micro < len(group)}
            sent = self._microbatches.send(step, micro, here)
            in_flight += [] if sent is None else [sent]
            if len(in_flight) >= self._settings.in_flight:
                self._microbatches.receive(in_flight.popleft())
        while in_flight:
            self._microbatches.receive(in_flight.popleft())
        self._cohort.add_penalties()
        own = self._settings.adapters == "own"
        for client in active:
            if not (client.working and client.end_step(step, own=own)):
                continue
            self._stepping.append(client)
            if client.progress.scored(step):
                client.progress.note(self._cohort.scores(client.slot, client.job.scoring.metric))

    def submit_step(self, step: int) -> None:
        """Tell the server to step."""
        for client in self._stepping:
            client.submit_step(step)

    def complete(self, step: int) -> list[str]:
        """Step every client for which the server has stepped; return their names."""
        return [client.job.client for client in self._stepping if client.take_step(step)]

    def results(self) -> list[Trained]:
        """Return what every client trained of its own sites, with its metrics."""
        return [
            client.progress.result(
                self._cohort.adapter(client.slot),
                wire_up=float(client.link.traffic.up),
                wire_down=float(client.link.traffic.down),
            )
            for client in self._clients
        ]
