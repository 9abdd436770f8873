"""The planner: ranks and a cut for every device, from its budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from polyrank.errors import RecipeError
from polyrank.planning.cost import CostModel
from polyrank.planning.cut import CutPoint
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.importance import Scores
from polyrank.planning.limits import NONE, Limits
from polyrank.planning.plan import Plan, PlanSettings, in_units
from polyrank.planning.rank_choices import derived_rank_choices
from polyrank.planning.search import Ranks, Search
from polyrank.planning.sharing import ByImportance, Even, Sharing
from polyrank.planning.spec import ModelSpec


class Planner:
    """Plans devices for one model and one workload.

    `server` trains the tails of split clients, `at_once` of them at a time, in what its memory
    leaves beside the base; with `shared` one set of factors serves them all. `steps` are a client's
    optimizer steps in a round.

    Raises RecipeError if no cut is possible, where some may be made.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cost: CostModel,
        settings: PlanSettings,
        server: DeviceProfile,
        *,
        steps: int,
        at_once: int,
        shared: bool = False,
    ):
        self.spec, self.cost, self.settings = spec, cost, settings
        self.server, self._steps, self._at_once, self._shared = server, steps, at_once, shared
        lowest, most = settings.lowest_cut, spec.blocks - 1 - settings.u_shape
        if settings.cuts != "none" and lowest > most:
            raise RecipeError(
                f"plan.lowest_cut: {lowest} of {spec.blocks} blocks at the client leave none to "
                f"the server{' in a U-shape' if settings.u_shape else ''}; lower it, or set "
                'plan.cuts = "none"'
            )

    def plans(
        self,
        devices: Mapping[str, DeviceProfile],
        known: Scores | Sharing | None = None,
        limits: Mapping[str, Limits] | None = None,
    ) -> dict[str, Plan]:
        """Return a plan for each device, by name.

        `known` are the sites' scores of importance, or how to share bytes among them. With nothing
        known, ranks are spread evenly over the sites. `limits` are those of some devices, by name,
        which their plans keep.
        """
        within = {name: (limits or {}).get(name, NONE) for name in devices}
        sharing: Sharing = Even()
        if isinstance(known, Mapping):
            sharing = ByImportance(known) if known else sharing
        elif known is not None:
            sharing = known
        search = Search(
            self.cost,
            self.settings,
            self.rank_choices(list(devices.values()), list(within.values())),
            self._units,
            sharing,
            self._predicted,
            server=self.server.memory_bytes,
            base=self._base,
            at_once=self._at_once,
            shared=self._shared,
        )
        searches = {limit: search.within(limit) for limit in set(within.values())}
        made: dict[tuple[DeviceProfile, Limits], Plan] = {}
        plans = {}
        for name, device in devices.items():
            alike = replace(device, name=""), within[name]  # Many clients may have the same.
            if alike not in made:
                made[alike] = self._within(searches[within[name]], search, device, within[name])
            plans[name] = replace(made[alike], device=device)
        return plans

    def rank_choices(
        self, devices: Sequence[DeviceProfile], limits: Sequence[Limits] | None = None
    ) -> tuple[int, ...]:
        """Return Q: as given, or derived from what the devices have beside a whole model.

        Derived choices stay below a quarter of the smaller side of the widest matrix [I]: beyond,
        factors are hardly thinner than the matrix. A device with `limits`, given in the same order,
        asks for no choice above its largest rank.
        """
        given = self.settings.levels
        if given is not None:
            most = max(min(site.shape) for site in self.spec.sites)
            if given[0] > most:
                raise RecipeError(
                    f"plan.levels: the smallest, {given[0]}, is above the largest rank of every "
                    f"site of the model, {most}; give smaller ones, or leave them out"
                )
            return given
        limit = {site.name: max(1, min(site.shape) // 4) for site in self.spec.sites}
        base = self.cost.memory(dict.fromkeys(limit, 1), None).total - sum(self._units.values())
        by_rank: dict[int | None, list[int]] = {}
        for device, own in zip(devices, limits or [NONE] * len(devices), strict=True):
            spare = max(0, device.memory_bytes - base)
            by_rank.setdefault(own.largest_rank, []).append(spare)
        derived = [
            derived_rank_choices(
                spare, self._units, {s: Limits(rank).rank(limit[s]) for s in limit}
            )
            for rank, spare in (by_rank or {None: []}).items()
        ]
        return max(derived, key=len)

    def largest(self, devices: Sequence[DeviceProfile], limits: Sequence[Limits]) -> dict[str, int]:
        """Return, per site, the largest rank that any plan of these devices may come to have."""
        top, blocks = self.rank_choices(devices, limits)[-1], self.spec.blocks
        own = max(limit.rank(top) for limit in limits)
        cuts = [cut for limit in set(limits) for cut in self._cuts(limit)]
        behind = {block for cut in cuts for block in cut.at_server(blocks)}
        return {
            site.name: min(top if site.block in behind else own, *site.shape)
            for site in self.spec.sites
        }

    def _cuts(self, limits: Limits) -> list[CutPoint]:
        blocks = self.spec.blocks
        possible = [] if self.settings.cuts == "none" else self.settings.possible_cuts(blocks)
        return limits.cuts(possible, blocks)

    @cached_property
    def _units(self) -> dict[str, int]:
        """Bytes that one more rank costs at each site; the same wherever it is trained."""
        by_shape: dict[tuple[int, int], int] = {}
        for site in self.spec.sites:
            if site.shape not in by_shape:
                at_one, at_two = (self.cost.memory({site.name: r}, None).total for r in (1, 2))
                by_shape[site.shape] = at_two - at_one
        return {site.name: by_shape[site.shape] for site in self.spec.sites}

    @cached_property
    def _base(self) -> int:
        """Bytes of the whole base's weights."""
        return self.cost.memory({}, None).weights

    def _within(self, search: Search, free: Search, device: DeviceProfile, limits: Limits) -> Plan:
        """Return the plan within limits; where they keep a device out, one that says which do."""
        cuts = [None, *self._cuts(limits)]
        if limits == NONE or search.possible(device, cuts):
            return self._plan(search, device)
        reasons = []
        if any(search.least(device, cut) for cut in cuts):
            refused = self._refused(search, device)
            reasons.append(refused.reason)
        else:
            refused = replace(self._predicted(device, {}, None), feasible=False)
            reasons.append("limits: they leave it nothing to train")
        for looser in limits.looser():
            others = free.within(looser), self._cuts(looser)
            if others[0].possible(device, [None, *others[1]]):
                told = ", ".join(self._changed(*others, device, limits, looser))
                reasons.append(f"it could take part with {told}")
                break
        else:
            if not refused.change:
                reasons.append(f"nor could it without them: {self._refused(free, device).reason}")
        return replace(refused, reason="; ".join(reasons))

    def _changed(
        self,
        search: Search,
        cuts: Sequence[CutPoint],
        device: DeviceProfile,
        limits: Limits,
        looser: Limits,
    ) -> Iterator[str]:
        """Say to what as little as possible of the limits is to be changed, up to the looser."""
        if looser.largest_rank != limits.largest_rank:
            yield f"limits.largest_rank = {search.choices[0]}"
        if looser.labels_may_leave != limits.labels_may_leave:
            yield "limits.labels_may_leave = true"
        if looser.lowest_cut != limits.lowest_cut:
            fit = [cut.lower for cut in cuts if search.possible(device, [cut])]
            yield f"limits.lowest_cut = {max(fit)}"

    def _plan(self, search: Search, device: DeviceProfile) -> Plan:
        whole = search.best_of(device, [None])
        if self.settings.cuts == "none" or (whole is not None and self.settings.cuts == "needed"):
            return whole or self._refused(search, device)
        split = search.best(device)
        if split is None or (whole is not None and search.worth(whole) >= search.worth(split)):
            return whole or self._refused(search, device)
        return replace(split, reason=self._why_cut(search, device, whole))

    def _why_cut(self, search: Search, device: DeviceProfile, whole: Plan | None) -> str:
        if whole is not None:
            return "cut: the whole model would leave less for ranks"
        needed = min((plan.memory.total for plan in search.least(device, None)), default=0)
        if needed > device.memory_bytes:
            return f"cut: the whole model needs {in_units(needed)}"
        return "cut: the whole model takes too long for a round"

    def _predicted(self, device: DeviceProfile, ranks: Ranks, cut: CutPoint | None) -> Plan:
        return Plan(
            device=device,
            ranks=dict(ranks),
            cut=cut,
            memory=self.cost.memory(ranks, cut),
            operations=self.cost.operations(ranks, cut),
            wire=self.cost.wire(cut),
            adapters=self.cost.adapter_bytes(ranks, cut),
            seconds=self.cost.seconds(ranks, cut, device, self.server, self._steps),
            feasible=True,
            reason="whole" if cut is None else "cut",
        )

    def _refused(self, search: Search, device: DeviceProfile) -> Plan:
        """Return the least that this device would have to afford, and by how much it does not."""
        cuts: list[CutPoint | None] = [None]
        if self.settings.cuts != "none":
            cuts += search.cuts
        least = [plan for cut in cuts for plan in search.least(device, cut)]
        plan = min(least, key=lambda plan: self._shortfall(search, plan))
        change = search.excess(plan)
        reasons = []
        if "memory" in change:
            reasons.append(
                f"memory: the least that can be trained ({_where(plan.cut)}) needs "
                f"{in_units(plan.memory.total)}, the device has "
                f"{in_units(device.memory_bytes)}: {plan.memory.total - device.memory_bytes} "
                "bytes too few"
            )
        if "server" in change:
            reasons.append(
                f"server: the base and the tails of {self._at_once} clients need "
                f"{in_units(int(change['server']))}, plan.server has "
                f"{in_units(self.server.memory_bytes)}"
            )
        if "seconds" in change:
            reasons.append(
                f"time: a round of it takes {plan.seconds.round:.4g} s, allowed are "
                f"{self.settings.seconds:.4g} s"
            )
        return replace(plan, feasible=False, reason="; ".join(reasons), change=change)

    def _shortfall(self, search: Search, plan: Plan) -> tuple[float, float]:
        """By what factor the budgets would have to grow, at most; then the bytes."""
        excess = search.excess(plan)
        budgets = {
            "memory": plan.device.memory_bytes,
            "server": self.server.memory_bytes,
            "seconds": self.settings.seconds or 1.0,
        }
        return max((excess[key] / budgets[key] for key in excess), default=1.0), plan.memory.total


def _where(cut: CutPoint | None) -> str:
    return "the whole model" if cut is None else f"cut at {cut}"
