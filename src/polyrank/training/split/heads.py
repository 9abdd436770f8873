"""The clients' end of split training: their first blocks, and in a U-shape the last ones too."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType

from polyrank.errors import ModelError
from polyrank.model import Cohort, Cut, LoadedModel, Span, side
from polyrank.training.job import Trained
from polyrank.training.local import merged_of, slot_of
from polyrank.training.split.job import SplitJob
from polyrank.training.split.link import Link
from polyrank.training.split.member import SplitClient
from polyrank.training.split.microbatch import InFlightBatch, Microbatches
from polyrank.training.split.settings import SplitSettings


class Heads:
    """Trains the first blocks of clients with one cut; attached while the context is entered.

    The jobs' assignments are of the clients' own sites. K clients of an in-process run share the
    passes; a client on its own machine is the only one, and `model` may then hold its blocks alone.
    For each optimizer step the caller asks for `gradients`, `submit_step` and `complete`, in this
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
            raise ModelError(f"Heads: expected clients of one cut, got {sorted(map(str, cuts))}")
        (split,) = cuts
        split.at_client(model.spec.blocks)
        cut = Cut(model, split.lower, split.upper)
        own = [Span(0, split.lower)] + ([] if split.upper is None else [Span(split.upper)])
        slots = [slot_of(one.job.assignment, one.job.local, one.job.seed) for one in jobs]
        merged = merged_of([one.job for one in jobs])
        scored = any(one.job.scoring.every for one in jobs)
        self._cohort = Cohort(side(model, *own), slots, merged, scored=scored)
        self._cohort.rest()
        self._members = [
            SplitClient(k, one, link, self._cohort.parameters(k))
            for k, (one, link) in enumerate(zip(jobs, self._links, strict=True))
        ]
        self._microbatches = Microbatches(model, cut, self._cohort, settings)
        self._stepping: list[SplitClient] = []

    @property
    def steps(self) -> int:
        """The optimizer steps of the client that takes most."""
        return max(one.course.steps for one in self._members)

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
        self._stepping = []
        active = [one for one in self._members if one.course.active(step)]
        if not active:
            return
        self._cohort.zero_gradients()
        for one in active:
            one.begin()
        groups = {one: one.course.next_group() for one in active}
        under_way: deque[InFlightBatch] = deque()
        for micro in range(max(len(group) for group in groups.values())):
            here = {one: group for one, group in groups.items() if micro < len(group)}
            sent = self._microbatches.send(step, micro, here)
            under_way += [] if sent is None else [sent]
            if len(under_way) >= self._settings.in_flight:
                self._microbatches.receive(under_way.popleft())
        while under_way:
            self._microbatches.receive(under_way.popleft())
        self._cohort.add_penalties()
        own = self._settings.adapters == "own"
        for one in active:
            if not (one.working and one.close_step(step, own=own)):
                continue
            self._stepping.append(one)
            if one.course.scored(step):
                one.course.note(self._cohort.scores(one.slot, one.job.scoring.metric))

    def submit_step(self, step: int) -> None:
        """Tell the server to step."""
        for one in self._stepping:
            one.ask(step)

    def complete(self, step: int) -> list[str]:
        """Take the step of every client whose server has taken it; return their names."""
        return [one.job.client for one in self._stepping if one.step(step)]

    def results(self) -> list[Trained]:
        """Return what every client trained of its own sites, with its numbers."""
        found = []
        for one in self._members:
            traffic = one.link.traffic
            found.append(
                one.course.result(
                    self._cohort.adapter(one.slot),
                    wire_up=float(traffic.up),
                    wire_down=float(traffic.down),
                )
            )
        return found
