"""Segment-wise averaging: every column over those who hold it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation import factors
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class Segment(Rule):
    """Average column j of B and row j of A over the round's clients with r_i ≥ j.

    With c_j = Σ_{i: r_i ≥ j} w_i, the weight of those who hold it,
    B̄_j = Σ_{r_i ≥ j} w_i B_i[:, j] / c_j and Ā_j likewise; a column that no client of the round
    holds (c_j = 0) stays as it is. A client of rank r is sent the first r columns and rows. So
    nothing is diluted, and rounds without training are fixed points.

    B̄Ā is not the average update, on purpose: a column that only few clients hold counts as much
    as one that all hold. It depends on the gauge and on the order of the columns, as all averages
    of factors do. With equal ranks it is FedIT.

    State: ``site/b`` m×k with s folded in, ``site/a`` k×n, at the server's rank k; at the start
    B = 0 and A random from the fleet's seed. No client may exceed the server's rank.

    Source: as RBLA, Chen et al., arXiv 2408.08699 [S]; weights and idle columns are ours [I].
    """

    @property
    def name(self) -> str:
        """``segment``."""
        return "segment"

    def init(self, spec: FleetSpec) -> State:
        """Return B = 0 and a random A; RankError for a client above the server's rank."""
        return factors.beginning(self.name, spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the first `rank` columns of B̄ and rows of Ā."""
        return SiteAssignment(factors.prefix(self.name, state, site, rank, scale))

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with every column averaged over those who hold it."""
        old = factors.server_factors(self.name, state, site)
        b, a = torch.zeros_like(old.b).double(), torch.zeros_like(old.a).double()
        c = torch.zeros(old.rank, dtype=torch.float64)
        dtype = old.b.dtype
        for change in factors.changes(self.name, site, old, contributions):
            r = change.result.rank
            b[:, :r] += change.weight * change.result.b
            a[:r] += change.weight * change.result.a
            c[:r] += change.weight
            dtype = torch.promote_types(dtype, change.result.b.dtype)
        some = c > 0
        mean = LowRank(
            torch.where(some, b / c.clamp_min(_TINY), old.b.double()).to(dtype),
            torch.where(some[:, None], a / c.clamp_min(_TINY)[:, None], old.a.double()).to(dtype),
        )
        report = SiteReport(energy=mean.norm() ** 2, discarded=0.0)
        return state.update(factors.tensors_of(site, mean)), report

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state with B̄Ā = these updates: B̄ = UΣ, Ā = Vᵀ, fresh rows where Σ is zero."""
        return factors.started(self.name, state, updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return B̄Ā at every site, its factors ordered by singular value."""
        return factors.ordered(self.name, state)


_TINY = sys.float_info.min
