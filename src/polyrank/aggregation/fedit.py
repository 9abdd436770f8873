"""FedIT: the mean of the factors, for fleets of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation import factors
from polyrank.aggregation.incoming import checked_fleet, checked_rank, checked_scale, incoming
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank
from polyrank.errors import RuleError
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class FedIT(Rule):
    """Average B and A separately: B̄ = Σ w_i B_i, Ā = Σ w_i A_i (FedAvg on LoRA's factors).

    The product B̄Ā is not the average update: B̄Ā = Σ w_i B_i A_i − Σ w_i (B_i − B̄)(A_i − Ā). It
    depends on the gauge too (BG, G⁻¹A give the same ΔW and another mean). All clients need one
    rank per site, the server's; ranks may differ from site to site.

    State: ``site/b`` m×r with s folded in, ``site/a`` r×n; at the start B = 0 and A random from the
    fleet's seed, the same for all. Weights must sum to one at every site.

    Source: Zhang et al., arXiv 2305.05644; the error term and the gauge are derived here.
    """

    @property
    def name(self) -> str:
        """``fedit``."""
        return "fedit"

    @property
    def mixed_ranks(self) -> bool:
        """No: factors of unequal ranks have no mean."""
        return False

    def init(self, spec: FleetSpec) -> State:
        """Return B = 0 and a random A; RuleError if clients or server differ in rank at a site."""
        checked_fleet(self.name, spec)
        for site in spec.shapes:
            ranks = {f"client {c!r}": r[site] for c, r in spec.ranks.items() if site in r}
            _refuse_mixed(site, ranks | {"the server": spec.server_rank[site]})
        return factors.beginning(self.name, spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the mean factors as they are; RuleError for another rank than the state's."""
        server = factors.server_factors(self.name, state, site)
        checked_rank(self.name, site, rank, server.shape)
        checked_scale(self.name, site, scale)
        if rank != server.rank:
            _refuse_mixed(site, {"the client": rank, "the server": server.rank})
        return SiteAssignment(server)

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with both factors averaged at this site."""
        server = factors.server_factors(self.name, state, site)
        b, a = torch.zeros_like(server.b).double(), torch.zeros_like(server.a).double()
        dtype = torch.float32
        for change in incoming(self.name, site, server.shape, contributions):
            if change.result.rank != server.rank:
                _refuse_mixed(site, {"an update": change.result.rank, "the server": server.rank})
            b += change.weight * change.result.b
            a += change.weight * change.result.a
            dtype = torch.promote_types(dtype, change.result.b.dtype)
        mean = LowRank(b.to(dtype), a.to(dtype))
        report = SiteReport(energy=mean.norm() ** 2, discarded=0.0)
        return state.update(factors.tensors_of(site, mean)), report

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state with B̄Ā = these updates: B̄ = UΣ, Ā = Vᵀ, fresh rows where Σ is zero."""
        return factors.started(self.name, state, updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return B̄Ā at every site, its factors ordered by singular value."""
        return factors.ordered(self.name, state)


def _refuse_mixed(site: str, ranks: dict[str, int]) -> None:
    if len(set(ranks.values())) > 1:
        low, high = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
        raise RuleError(
            f"fedit averages factors and needs one rank per site, but at {site!r} {low} has rank "
            f"{ranks[low]} and {high} has rank {ranks[high]}; use flexlora, or force one rank"
        )
