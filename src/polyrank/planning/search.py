"""The search for a device's plan: cuts, depths and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy

from polyrank.planning.cost import CostModel
from polyrank.planning.cut import CutPoint
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.limits import Limits
from polyrank.planning.plan import Plan, PlanSettings
from polyrank.planning.sharing import Sharing
from polyrank.planning.spec import Site

MOST_OPTIONS = 16
"""Cuts, and depths per cut, that are tried; deeper models are tried at evenly spread ones."""

_TRIES = 4
"""Budgets that are tried where ranks cost more together than was foreseen of each."""

Ranks = Mapping[str, int]
Predict = Callable[[DeviceProfile, Ranks, CutPoint | None], Plan]


class Search:
    """The plans that are tried for devices, by one sharing of bytes among sites.

    `cuts` are those that may be, the fewest blocks at the client first. `units` are the bytes of
    one more rank per site. The server holds the `base` and the tails of `at_once` clients in
    `server` bytes. With `shared` all clients have the same ranks at sites behind their cuts.
    """

    def __init__(
        self,
        cost: CostModel,
        settings: PlanSettings,
        choices: tuple[int, ...],
        units: Mapping[str, int],
        sharing: Sharing,
        predict: Predict,
        *,
        server: int,
        base: int,
        at_once: int,
        shared: bool,
    ):
        self.sharing, self.choices = sharing, choices
        self._cost, self._settings, self._units, self._predict = cost, settings, units, predict
        self._server, self._base, self._at_once, self._shared = server, base, at_once, shared
        self._sites = cost.spec.sites
        self._limit = {site.name: min(site.shape) for site in self._sites}
        self._own_limit = self._limit
        self._all_cuts = self.cuts = self._settings.possible_cuts(cost.spec.blocks)
        self._tails: dict[CutPoint, dict[str, int]] = {}
        self._needs: dict[CutPoint, int] = {}
        self._slopes: dict[tuple[object, ...], tuple[int, int]] = {}

    def within(self, limits: Limits) -> Search:
        """Return the same for devices with these limits; what the server trains stays the same."""
        limited = copy(self)
        limited.cuts = limits.cuts(self._all_cuts, self._cost.spec.blocks)
        limited._own_limit = {site: limits.rank(most) for site, most in self._limit.items()}
        return limited

    # --- what is tried ---

    def best(self, device: DeviceProfile) -> Plan | None:
        """Return the plan worth most that is cut and fits all budgets; None if none does.

        Of equal ones that with the most blocks at the client: it tells the server least. Of many
        cuts evenly spread ones are tried, then those around the best of them.
        """
        tried = _spread(range(len(self.cuts)))
        best = self.best_of(device, [self.cuts[i] for i in tried])
        if best is None or len(tried) == len(self.cuts):
            return best
        at = tried.index(next(i for i in tried if self.cuts[i] == best.cut))
        first, last = tried[max(0, at - 1)], tried[min(len(tried) - 1, at + 1)]
        return self.best_of(device, self.cuts[first : last + 1])

    def best_of(self, device: DeviceProfile, cuts: Sequence[CutPoint | None]) -> Plan | None:
        """Return the plan worth most at one of these cuts that fits all budgets."""
        best: Plan | None = None
        for cut in cuts:
            for ranks in self._candidates(device, cut):
                plan = self._predict(device, ranks, cut)
                if self.excess(plan):
                    continue
                if best is None or self.worth(plan) >= self.worth(best):
                    best = plan
        return best

    def least(self, device: DeviceProfile, cut: CutPoint | None) -> list[Plan]:
        """Return the least that a client can train at a cut: beside a tail nothing, else a site."""
        tail = {} if cut is None else self.tail(cut)
        options = [tail]
        if not tail:
            level = self.choices[0]
            fit = [site for site in self._own(cut) if level <= self._own_limit[site.name]]
            last = max((site.block for site in fit), default=0)
            options = [{site.name: level} for site in fit if site.block == last]
        return [self._predict(device, ranks, cut) for ranks in options]

    def _own(self, cut: CutPoint | None) -> list[Site]:
        if cut is None:
            return list(self._sites)
        blocks = cut.at_client(self._cost.spec.blocks)
        return [site for site in self._sites if site.block in blocks]

    def _candidates(self, device: DeviceProfile, cut: CutPoint | None) -> Iterator[dict[str, int]]:
        """Yield ranks to try: the least that can be trained, then for each depth of backward."""
        tail = {} if cut is None else self.tail(cut)
        for plan in self.least(device, cut):
            yield dict(plan.ranks)

        def needed(ranks: Ranks) -> int:
            return self._cost.memory(ranks, cut).total

        for eligible in self._by_depth(self._own(cut)):
            budget, limit = device.memory_bytes, self._own_limit
            ranks = self._filled(needed, budget, eligible, limit, ("client", cut))
            if ranks:
                yield {**ranks, **tail}

    def _by_depth(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The sites from each depth on; where all steps go down to the first block, all at once."""
        depths = sorted({site.block for site in sites})
        if self._cost.workload.scored:
            depths = depths[:1]
        return [[site for site in sites if site.block >= depth] for depth in _spread(depths)]

    def tail(self, cut: CutPoint) -> dict[str, int]:
        """Return the ranks behind the cut that one client's share of the server affords."""
        if cut not in self._tails:
            self._tails[cut] = self._tail(cut)
        return self._tails[cut]

    def _tail(self, cut: CutPoint) -> dict[str, int]:
        at_server = cut.at_server(self._cost.spec.blocks)
        behind = [site for site in self._sites if site.block in at_server]
        if self._shared and cut != self._all_cuts[0]:
            everyone = self.tail(self._all_cuts[0])
            return {s.name: everyone[s.name] for s in behind if s.name in everyone}

        share = (self._server - self._base) // self._at_once

        def needed(ranks: Ranks) -> int:
            return self._cost.server_memory(ranks, cut).total

        options = [
            self._filled(needed, share, eligible, self._limit, ("server", cut))
            for eligible in self._by_depth(behind)
        ]
        return max(options, key=self.sharing.worth, default={})

    def _needed_at_server(self, cut: CutPoint) -> int:
        if cut not in self._needs:
            tail = self._cost.server_memory(self.tail(cut), cut).total
            self._needs[cut] = self._base + self._at_once * tail
        return self._needs[cut]

    # --- ranks that fill bytes ---

    def _filled(
        self,
        needed: Callable[[Ranks], int],
        budget: int,
        eligible: Sequence[Site],
        limit: Mapping[str, int],
        where: tuple[object, ...],
    ) -> dict[str, int]:
        """Return ranks at these sites that fill the bytes; twice, for what empty sites leave."""
        filled: dict[str, int] = {}
        sites = tuple(site.name for site in eligible)
        for _ in range(2):
            none, more = self._slope(needed, sites, where)
            share = sum(self._units[site] for site in sites)
            units = {site: max(1, round(more * self._units[site] / share)) for site in sites}
            most = {site: limit[site] for site in sites}
            ranks = self._fitting(needed, budget, budget - none, units, most)
            if not ranks:
                return filled
            if tuple(ranks) == sites:
                return ranks
            filled, sites = ranks, tuple(ranks)
        return filled

    def _slope(
        self, needed: Callable[[Ranks], int], sites: tuple[str, ...], where: tuple[object, ...]
    ) -> tuple[int, int]:
        """Return the bytes with all these sites trained, less ranks, and those of one rank more."""
        key = (*where, sites)
        if key not in self._slopes:
            at_one, at_two = (needed(dict.fromkeys(sites, rank)) for rank in (1, 2))
            self._slopes[key] = (2 * at_one - at_two, at_two - at_one)
        return self._slopes[key]

    def _fitting(
        self,
        needed: Callable[[Ranks], int],
        budget: int,
        left: int,
        units: Mapping[str, int],
        limit: Mapping[str, int],
    ) -> dict[str, int]:
        """Return ranks for the bytes left, fewer where they turn out to need more than foreseen."""
        for _ in range(_TRIES):
            if left <= 0:
                return {}
            given = self.sharing.ranks(units, left, self.choices, limit)
            ranks = {site: rank for site, rank in given.items() if rank}
            over = needed(ranks) - budget
            if over <= 0:
                return ranks
            left -= over
        return {}

    # --- judging ---

    def possible(self, device: DeviceProfile, cuts: Iterable[CutPoint | None]) -> bool:
        """Whether the least that can be trained at one of these cuts fits all budgets."""
        least = (plan for cut in cuts for plan in self.least(device, cut))
        return any(not self.excess(plan) for plan in least)

    def worth(self, plan: Plan) -> tuple[float, float]:
        """Return what plans are compared by."""
        return self.sharing.worth(plan.ranks)

    def excess(self, plan: Plan) -> dict[str, float]:
        """Return the budgets that a plan exceeds, and what it would need of them."""
        exceeded: dict[str, float] = {}
        if plan.memory.total > plan.device.memory_bytes:
            exceeded["memory"] = plan.memory.total
        if plan.cut is not None and self._needed_at_server(plan.cut) > self._server:
            exceeded["server"] = self._needed_at_server(plan.cut)
        bound = self._settings.seconds
        if bound is not None and plan.seconds.round > bound:
            exceeded["seconds"] = plan.seconds.round
        return exceeded


def _spread(values: Sequence[int]) -> list[int]:
    """Return at most `MOST_OPTIONS` of the values, the first and the last among them."""
    if len(values) <= MOST_OPTIONS:
        return list(values)
    step = (len(values) - 1) / (MOST_OPTIONS - 1)
    return sorted({values[round(i * step)] for i in range(MOST_OPTIONS)})
