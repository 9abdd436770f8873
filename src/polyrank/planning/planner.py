"""Who trains what: ranks and a cut for every device, from its budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from polyrank.planning.allocate import allocate
from polyrank.planning.cost import CostModel
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.importance import Scores
from polyrank.planning.levels import derived_levels
from polyrank.planning.plan import Plan, PlanSettings, mebibytes
from polyrank.planning.spec import ModelSpec, Site
from polyrank.planning.split import Split

MOST_OPTIONS = 16
"""Cuts, and depths per cut, that are tried; deeper models are tried at evenly spread ones."""


class Planner:
    """Plans devices for one model and one workload.

    `server` trains the tails of split clients, `at_once` of them at a time, in what its memory
    leaves beside the base. `steps` are a client's optimizer steps in a round.
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
    ):
        self.spec, self.cost, self.settings = spec, cost, settings
        self.server, self._steps, self._at_once = server, steps, at_once
        self._limit = {site.name: min(site.shape) for site in spec.sites}
        self._even = True

    def plans(
        self, devices: Mapping[str, DeviceProfile], gains: Scores | None = None
    ) -> dict[str, Plan]:
        """Return a plan for each device, by name; `gains` are the sites' importance.

        Sites without a score count as the least important of those that have one. Without `gains`
        nothing is known: ranks are then spread evenly over the sites.
        """
        self._even = not gains
        least = min(gains.values(), default=1.0) if gains else 1.0
        given = {site.name: (gains or {}).get(site.name, least) for site in self.spec.sites}
        levels = self.levels(list(devices.values()))
        return {name: self._plan(device, given, levels) for name, device in devices.items()}

    def levels(self, devices: Sequence[DeviceProfile]) -> tuple[int, ...]:
        """Return Q: as given, or derived from what the devices have beside a whole model.

        Derived levels stay below a quarter of the smaller side of the widest matrix [I]: beyond,
        factors are hardly thinner than the matrix.
        """
        if self.settings.levels is not None:
            return self.settings.levels
        limit = {site: max(1, most // 4) for site, most in self._limit.items()}
        base = self.cost.memory(dict.fromkeys(self._limit, 1), None).total - sum(
            self._units.values()
        )
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

    def _shared_out(
        self,
        gains: Scores,
        units: Mapping[str, int],
        budget: int,
        levels: tuple[int, ...],
    ) -> dict[str, int]:
        """Return the ranks of these sites that the bytes afford, sites of rank 0 left out."""
        limit = {site: self._limit[site] for site in units}
        if self._even:
            found = even(units, budget, levels, limit)
        else:
            found = allocate({s: gains[s] for s in units}, units, budget, levels, limit)
        return {site: rank for site, rank in found.items() if rank}

    def _plan(self, device: DeviceProfile, gains: Scores, levels: tuple[int, ...]) -> Plan:
        whole = self._best(device, gains, levels, [None])
        if self.settings.cuts == "none" or (whole is not None and self.settings.cuts == "needed"):
            return whole or self._refused(device, gains, levels)
        split = self._best(device, gains, levels, self._cuts())
        if split is None or (
            whole is not None and self._worth(whole.ranks, gains) >= self._worth(split.ranks, gains)
        ):
            return whole or self._refused(device, gains, levels)
        return replace(split, reason=self._why_cut(device, whole, levels[0]))

    def _why_cut(self, device: DeviceProfile, whole: Plan | None, level: int) -> str:
        if whole is not None:
            return "cut: the whole model would leave less for ranks"
        needed = min(self.cost.memory(one, None).total for one in self._least(None, level))
        if needed > device.memory_bytes:
            return f"cut: the whole model needs {mebibytes(needed)}"
        return "cut: the whole model takes too long for a round"

    # --- options ---

    def _cuts(self) -> list[Split]:
        """The cuts that may be, the fewest blocks at the client first."""
        blocks, lowest = self.spec.blocks, self.settings.lowest_cut
        if not self.settings.u_shape:
            return [Split(lower) for lower in _spread(range(lowest, blocks))]
        return [Split(lower, blocks - 1) for lower in _spread(range(lowest, blocks - 1))]

    def _best(
        self,
        device: DeviceProfile,
        gains: Scores,
        levels: tuple[int, ...],
        cuts: Sequence[Split | None],
    ) -> Plan | None:
        """Return the plan with the most weighted rank at one of these cuts that fits all budgets.

        Of equal ones that with the most blocks at the client: it tells the server least.
        """
        best: Plan | None = None
        for cut in cuts:
            for ranks in self._candidates(device, gains, levels, cut):
                plan = self._predicted(device, ranks, cut)
                if self._excess(plan):
                    continue
                if best is None or self._worth(ranks, gains) >= self._worth(best.ranks, gains):
                    best = plan
        return best

    def _candidates(
        self, device: DeviceProfile, gains: Scores, levels: tuple[int, ...], cut: Split | None
    ) -> Iterator[dict[str, int]]:
        """Yield ranks to try: the least that can be trained, then for each depth of backward."""
        tail = self._tail(gains, levels, cut)
        for least in self._least(cut, levels[0]):
            if least or tail:
                yield {**least, **tail}
        own = self._own(cut)

        def needed(ranks: Mapping[str, int]) -> int:
            return self.cost.memory(ranks, cut).total

        for depth in _spread(sorted({site.block for site in own})):
            eligible = [site for site in own if site.block >= depth]
            ranks = self._filled(gains, levels, needed, device.memory_bytes, eligible)
            if ranks:
                yield {**ranks, **tail}

    def _filled(
        self,
        gains: Scores,
        levels: tuple[int, ...],
        needed: Callable[[Mapping[str, int]], int],
        budget: int,
        eligible: Sequence[Site],
    ) -> dict[str, int]:
        """Return ranks at these sites that fill the bytes; twice, for what empty sites leave."""
        found: dict[str, int] = {}
        sites = [site.name for site in eligible]
        for _ in range(2):
            ones, twos = dict.fromkeys(sites, 1), dict.fromkeys(sites, 2)
            one, share = needed(ones), sum(self._units[site] for site in sites)
            more = needed(twos) - one  # What one more rank costs at all of them.
            units = {site: max(1, round(more * self._units[site] / share)) for site in sites}
            left = budget - (one - more)
            ranks = self._shared_out(gains, units, left, levels) if left > 0 else {}
            if not ranks or needed(ranks) > budget:
                return found
            found, sites = ranks, list(ranks)
        return found

    def _tail(self, gains: Scores, levels: tuple[int, ...], cut: Split | None) -> dict[str, int]:
        """Return the ranks behind the cut that one client's share of the server affords."""
        if cut is None:
            return {}
        at_server = cut.at_server(self.spec.blocks)
        behind = [site for site in self.spec.sites if site.block in at_server]
        share = (self.server.memory_bytes - self._base) // self._at_once

        def needed(ranks: Mapping[str, int]) -> int:
            return self.cost.server_memory(ranks, cut).total

        options = [
            self._filled(gains, levels, needed, share, [s for s in behind if s.block >= depth])
            for depth in _spread(sorted({site.block for site in behind}))
        ]
        return max(options, key=lambda ranks: self._worth(ranks, gains), default={})

    @cached_property
    def _base(self) -> int:
        """Bytes of the whole base's weights."""
        return self.cost.memory({}, None).weights

    def _own(self, cut: Split | None) -> list[Site]:
        if cut is None:
            return list(self.spec.sites)
        blocks = cut.at_client(self.spec.blocks)
        return [site for site in self.spec.sites if site.block in blocks]

    def _least(self, cut: Split | None, level: int) -> list[dict[str, int]]:
        """The least that a client can train: nothing of its own beside a tail, else one site."""
        if cut is not None:
            return [{}]
        last = max(site.block for site in self.spec.sites)
        return [
            {site.name: level}
            for site in self.spec.sites
            if site.block == last and level <= self._limit[site.name]
        ]

    # --- judging ---

    def _worth(self, ranks: Mapping[str, int], gains: Scores) -> tuple[float, float]:
        """Return what plans are compared by: Σ gain·rank.

        Where nothing is known, how many sites are trained comes first.
        """
        total = sum(gains[site] * rank for site, rank in ranks.items())
        return (len(ranks), total) if self._even else (total, 0.0)

    def _predicted(
        self, device: DeviceProfile, ranks: Mapping[str, int], cut: Split | None
    ) -> Plan:
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

    def _excess(self, plan: Plan) -> dict[str, float]:
        """Return the budgets that a plan exceeds, and what it would need of them."""
        found: dict[str, float] = {}
        if plan.memory.total > plan.device.memory_bytes:
            found["memory"] = plan.memory.total
        bound = self.settings.seconds
        if bound is not None and plan.seconds.round > bound:
            found["seconds"] = plan.seconds.round
        return found

    def _refused(self, device: DeviceProfile, gains: Scores, levels: tuple[int, ...]) -> Plan:
        """Return the least that this device would have to afford, and by how much it does not."""
        cuts: list[Split | None] = [None]
        if self.settings.cuts != "none":
            cuts += self._cuts()
        least = [
            self._predicted(device, {**ranks, **tail}, cut)
            for cut in cuts
            for tail in [self._tail(gains, levels, cut)]
            for ranks in self._least(cut, levels[0])
            if ranks or tail
        ]
        plan = min(least, key=self._shortfall)
        change = self._excess(plan)
        reasons = []
        if "memory" in change:
            reasons.append(
                f"memory: the least that can be trained ({_where(plan.cut)}) needs "
                f"{mebibytes(plan.memory.total)}, the device has "
                f"{mebibytes(device.memory_bytes)}: {plan.memory.total - device.memory_bytes} "
                "bytes too few"
            )
        if "seconds" in change:
            reasons.append(
                f"time: a round of it takes {plan.seconds.round:.4g} s, allowed are "
                f"{self.settings.seconds:.4g} s"
            )
        return replace(plan, feasible=False, reason="; ".join(reasons), change=change)

    def _shortfall(self, plan: Plan) -> tuple[float, float]:
        """By what factor the budgets would have to grow, at most; then the bytes."""
        excess = self._excess(plan)
        budgets = {"memory": plan.device.memory_bytes, "seconds": self.settings.seconds or 1.0}
        return max((excess[key] / budgets[key] for key in excess), default=1.0), plan.memory.total


def even(
    units: Mapping[str, int], budget: int, levels: Sequence[int], limit: Mapping[str, int]
) -> dict[str, int]:
    """Return ranks that spread bytes over sites of which nothing is known.

    All sites are brought to the first level, in order, then to the next, as far as the bytes go.
    """
    ranks = dict.fromkeys(units, 0)
    for level in levels:
        for site, unit in units.items():
            more = unit * (level - ranks[site])
            if level <= limit[site] and more <= budget:
                ranks[site], budget = level, budget - more
    return ranks


def _where(cut: Split | None) -> str:
    return "the whole model" if cut is None else f"cut at {cut}"


def _spread(values: Sequence[int]) -> list[int]:
    """Return at most `MOST_OPTIONS` of the values, the first and the last among them."""
    if len(values) <= MOST_OPTIONS:
        return list(values)
    step = (len(values) - 1) / (MOST_OPTIONS - 1)
    return sorted({values[round(i * step)] for i in range(MOST_OPTIONS)})
