"""Plans in a run: who trains what, and when that is decided anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from polyrank.aggregation import FleetSpec
from polyrank.algebra import Adapter, Delta
from polyrank.data import sizes
from polyrank.planning import (
    BySpectrum,
    CostModel,
    DeviceProfile,
    Fleet,
    Limits,
    ModelSpec,
    Plan,
    Planner,
    PlanSettings,
    Scores,
    Workload,
    averaged,
    moved,
    planned_fleet,
    smoothed,
)
from polyrank.run.adapter import factored

if TYPE_CHECKING:
    from polyrank.model import LoadedModel
    from polyrank.run.settings import RunSettings
    from polyrank.training import ClientWork, LocalTraining

Allocation = Literal["importance", "spectrum"]


@dataclass(frozen=True)
class Importance:
    """What a run knows of the sites' importance.

    `scores` are smoothed over the rounds, `planned` those that the present plan was made with; both
    are empty before the first scores. `spectra` are the aggregate's singular values per site when
    it was made, where ranks follow them.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    planned: Mapping[str, float] = field(default_factory=dict)
    spectra: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A fleet with the plans that its ranks and cuts are from, by device."""

    plans: Mapping[str, Plan]
    fleet: Fleet

    def narrowest(self, spec: ModelSpec) -> Mapping[str, int]:
        """Return the ranks of the clients that train the fewest blocks, ties by device."""
        at = {site.name: site.block for site in spec.sites}
        every = self.fleet.ranks_by_type(spec)
        blocks = {name: len({at[site] for site in ranks}) for name, ranks in every.items()}
        return every[min(blocks, key=lambda name: (blocks[name], name))]

    def seconds(self, clients: Iterable[str], round: int) -> float | None:
        """Return how long a round of these clients takes by the cost model: the slowest's time.

        None if the arithmetic or the links of one of them are not known.
        """
        types = self.fleet.at(round)
        times = [self.plans[types[client]].seconds for client in clients]
        if any(name.startswith("device.") for seconds in times for name in seconds.ignored):
            return None
        return max(seconds.round for seconds in times)


@dataclass(frozen=True)
class Planning:
    """A fleet of devices, whose ranks and cuts a planner decides, at first and after rounds.

    `fleet` has devices for types. With `metric` importance is scored at every `every`-th optimizer
    step of a client (None: never, and ranks are spread evenly), smoothed over `rounds` rounds, and
    once more than `threshold` of it lies at other sites than when the plan was made (`moved`),
    plans are made anew. With `allocation` ``spectrum`` new plans share ranks out by the spectra of
    the aggregate, as it is then, instead of by scores. `force` gives every client the plan of one
    device, or of the ``weakest``, which has the least memory. `limits` are those of some devices,
    which no plan goes beyond; where one plan is everybody's, it keeps the limits of all.
    """

    planner: Planner
    devices: Mapping[str, DeviceProfile]
    fleet: Fleet
    rounds: int
    metric: str | None = "channel"
    every: int | Literal["auto"] = "auto"
    threshold: float = 0.1
    force: str | None = None
    allocation: Allocation = "importance"
    limits: Mapping[str, Limits] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Return what plans depend on beside model, data and local training, as JSON."""
        settings, server = self.planner.settings, self.planner.server
        limits = {name: asdict(each) for name, each in sorted(self.limits.items())}
        return {
            "settings": asdict(settings),
            "devices": {name: each.written for name, each in sorted(self.devices.items())},
            "server": server.written,
            "metric": self.metric,
            "threshold": self.threshold,
            "force": self.force,
            "allocation": self.allocation,
            **({"limits": limits} if limits else {}),
        }

    def plans(self, known: Importance) -> dict[str, Plan]:
        """Return every device's plan, by what was known when it was made."""
        by = BySpectrum(known.spectra) if known.spectra else known.planned
        return self.planner.plans(self.devices, by, self._within)

    @property
    def levels(self) -> tuple[int, ...]:
        """The ranks that plans choose from."""
        return self.planner.rank_choices([*self.devices.values()], [*self._within.values()])

    @property
    def _within(self) -> dict[str, Limits]:
        """The limits of every device, in order; of all where its plan may be everybody's."""
        if self.force is not None:
            return dict.fromkeys(self.devices, Limits.of_all([*self.limits.values()]))
        return {name: self.limits.get(name, Limits()) for name in self.devices}

    def unable(self) -> dict[str, str]:
        """Return the clients whose device cannot take part, with the reason; by the first plans.

        None of them where devices change hands, so that a device is nobody's own.
        """
        if self.fleet.schedule is not None:
            return {}
        plans = self.plans(Importance())
        named = sorted(self.fleet.assigned.items())
        return {
            client: plans[device].reason for client, device in named if not plans[device].feasible
        }

    @cached_property
    def first(self) -> Planned:
        """The fleet with its plans before anything is known of importance."""
        return self.planned(Importance())

    def planned(self, known: Importance) -> Planned:
        """Return the fleet with its plans; RecipeError if a client's device cannot take part."""
        plans = self.plans(known)
        fleet = planned_fleet(self.fleet, plans)
        if self.force is None:
            return Planned(plans, fleet)
        smallest = min(fleet.possible, key=lambda name: self.devices[name].memory_bytes)
        name = smallest if self.force == "weakest" else self.force
        return Planned(plans, fleet.forced(name, self.planner.spec))

    def after(
        self,
        known: Importance,
        scores: Mapping[str, Scores],
        weights: Mapping[str, float],
        round: int,
    ) -> Importance:
        """Return what is known after a round, from its clients' scores."""
        if self.metric is None or not any(scores.values()):
            return known
        now = smoothed(
            known.scores or None,
            averaged(scores, weights),
            min(round, self.rounds),
            self.rounds,
        )
        before = known.planned or dict.fromkeys(now, 1.0)
        anew = moved(before, now) > self.threshold
        return replace(known, scores=now, planned=now if anew else known.planned)

    def with_spectra(self, known: Importance, adapter: Adapter[Delta]) -> Importance:
        """Return the same with the spectra of the aggregate, up to the top level.

        As it is where ranks do not follow spectra.
        """
        if self.allocation != "spectrum":
            return known
        top = self.levels[-1]
        spectra = {site: factored(delta, top).s.tolist() for site, delta in adapter.items()}
        return replace(known, spectra=spectra)

    def most(self, spec: FleetSpec) -> FleetSpec:
        """Return what a rule is told of a fleet of which any site may come to have any level.

        Where nothing is scored, plans are never made anew, and it is told of their ranks alone.
        """
        if self.metric is None:
            return spec
        largest = self.planner.largest([*self.devices.values()], [*self._within.values()])
        return replace(
            spec,
            shapes=dict(self.planner.spec.shapes),
            ranks={**spec.ranks, "any that is planned anew, by plan.importance": largest},
            server_rank={
                site: max(rank, spec.server_rank.get(site, 0)) for site, rank in largest.items()
            },
        )


def planner_of(
    model: LoadedModel,
    work: Mapping[str, ClientWork],
    local: LocalTraining,
    run: RunSettings,
    settings: PlanSettings,
    server: DeviceProfile,
    *,
    scored: bool = False,
) -> Planner:
    """Return the planner of a run; the model may be one without weights.

    A client's step is taken to be a microbatch of the longest rows of all clients, with the most
    targets, and a round as long as that of the client that takes most steps. With `scored` some
    steps measure importance, for which there must be memory.
    """
    from polyrank.model import anatomy_of

    seen = [client for client in work.values() if client.seen]
    rows = [size for client in seen for size in sizes(client.rows["train"])]
    workload = Workload(
        batch=local.batch,
        length=max(size.tokens for size in rows),
        targets=max(size.targets for size in rows),
        accumulation=local.accumulation,
        moments=local.moments,
        proximal=local.resolved.proximal > 0,
        itemsize=model.dtype.itemsize,
        factor_itemsize=max(4, model.dtype.itemsize),
        wire=run.split.wire,
        in_flight=run.split.in_flight,
        checkpointing=model.checkpointing,
        dropout=local.dropout > 0,
        scored=scored,
    )
    spec: ModelSpec = model.spec
    return Planner(
        spec,
        CostModel(anatomy_of(model), spec, workload),
        settings,
        server,
        steps=max(local.steps_for(len(client.rows["train"])) for client in seen),
        at_once=run.sampling.count(len(seen)),
        shared=run.split.adapters == "shared",
    )
