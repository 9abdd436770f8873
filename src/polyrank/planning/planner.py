"""Who trains what: ranks and a cut for every device, from its budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from polyrank.errors import RecipeError
from polyrank.planning.cost import CostModel
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.importance import Scores
from polyrank.planning.levels import derived_levels
from polyrank.planning.plan import Plan, PlanSettings, in_units
from polyrank.planning.search import Ranks, Search
from polyrank.planning.sharing import ByImportance, Even, Sharing
from polyrank.planning.spec import ModelSpec
from polyrank.planning.split import Split


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
        self, devices: Mapping[str, DeviceProfile], known: Scores | Sharing | None = None
    ) -> dict[str, Plan]:
        """Return a plan for each device, by name.

        `known` are the sites' scores of importance, or how to share bytes among them. With nothing
        known, ranks are spread evenly over the sites.
        """
        sharing: Sharing = Even()
        if isinstance(known, Mapping):
            sharing = ByImportance(known) if known else sharing
        elif known is not None:
            sharing = known
        search = Search(
            self.cost,
            self.settings,
            self.levels(list(devices.values())),
            self._units,
            sharing,
            self._predicted,
            server=self.server.memory_bytes,
            base=self._base,
            at_once=self._at_once,
            shared=self._shared,
        )
        return {name: self._plan(search, device) for name, device in devices.items()}

    def levels(self, devices: Sequence[DeviceProfile]) -> tuple[int, ...]:
        """Return Q: as given, or derived from what the devices have beside a whole model.

        Derived levels stay below a quarter of the smaller side of the widest matrix [I]: beyond,
        factors are hardly thinner than the matrix.
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
        spare = [max(0, device.memory_bytes - base) for device in devices]
        return derived_levels(spare, self._units, limit)

    @cached_property
    def _units(self) -> dict[str, int]:
        """Bytes that one more rank costs at each site; the same wherever it is trained."""
        by_shape: dict[tuple[int, int], int] = {}
        for site in self.spec.sites:
            if site.shape not in by_shape:
                one, two = (self.cost.memory({site.name: r}, None).total for r in (1, 2))
                by_shape[site.shape] = two - one
        return {site.name: by_shape[site.shape] for site in self.spec.sites}

    @cached_property
    def _base(self) -> int:
        """Bytes of the whole base's weights."""
        return self.cost.memory({}, None).weights

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

    def _predicted(self, device: DeviceProfile, ranks: Ranks, cut: Split | None) -> Plan:
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
        cuts: list[Split | None] = [None]
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


def _where(cut: Split | None) -> str:
    return "the whole model" if cut is None else f"cut at {cut}"
