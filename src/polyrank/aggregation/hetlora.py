"""HetLoRA: zero-padded averages, weighted by norm, and clients that give up ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from polyrank.aggregation import factors
from polyrank.aggregation.client_factors import initial_rows
from polyrank.aggregation.incoming import Change
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import (
    Contribution,
    FleetSpec,
    Json,
    SiteAssignment,
    SiteReport,
    State,
)
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank
from polyrank.errors import RuleError
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class HetLoRA(Rule):
    """Pad factors with zeros to the server's rank and average them, weighted by ‖ΔW_i‖_F.

    - *Assign*: the first r_i columns of B̄ and rows of Ā. A column that is zero in both could never
      train again; its row of A is sent fresh, the same for all clients of a round [I].
    - *Local term*: `penalty`·‖B[:, g:]‖_F ‖A[g:]‖_F with g = max(1, ⌊`gamma`·r⌋) [S; the rounding
      is I: at 0.99 one rank of up to a hundred is at stake].
    - *Self-pruning*: where that product ended strictly below its value as sent, and that was not
      zero, the client's rank at this site is g from then on, and the tail behind g of this update
      is dropped. A client never gets a pruned rank back [S].
    - *Merge*: B̄ = Σ p_i pad(B_i), Ā = Σ p_i pad(A_i), p_i = ‖ΔW_i‖_F / Σ_k ‖ΔW_k‖_F over the whole
      adapter, instead of the clients' examples [S]. The norms are those of the updates as trained,
      before a tail is dropped [I]; if all are zero, clients count equally.

    B̄Ā is not the average update, and columns that only some clients hold are diluted in both
    factors: without training, product j shrinks by about c_j² in every round [D]. That is the rule.
    `gamma` = 1 turns pruning off, and the penalty with it. The comparison is made on factors with s
    folded in; s is one number per client and site, so the sign is that of the factors as trained.

    State: ``site/b`` m×k with s folded in, ``site/a`` k×n, at the server's rank k; scalars
    ``site/pruned``: client -> rank. No client may exceed the server's rank.

    Source: Cho et al., arXiv 2401.06432 [S]; 0.99 and 0.01 as in public re-implementations [S].
    Raises RuleError unless 0 < gamma ≤ 1 and penalty is finite and not negative.
    """

    gamma: float = 0.99
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise RuleError(
                f"hetlora: gamma = {self.gamma}; expected a share in (0, 1], 1: no pruning"
            )
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise RuleError(f"hetlora: penalty = {self.penalty}; expected a finite number ≥ 0")

    @property
    def name(self) -> str:
        """``hetlora``."""
        return "hetlora"

    @property
    def excludes(self) -> Mapping[str, str]:
        """One adapter for all split clients, unless pruning is off."""
        if self.gamma == 1:
            return {}
        return {
            "shared": "clients prune ranks each for itself and come to hold unequal ones; set "
            "gamma = 1"
        }

    def init(self, spec: FleetSpec) -> State:
        """Return B = 0 and a random A; RankError for a client above the server's rank."""
        return factors.beginning(self.name, spec)

    def ranks(self, state: State, client: str, ranks: Mapping[str, int]) -> Mapping[str, int]:
        """Return the ranks that the client can afford and has not pruned."""
        return {
            site: min(rank, _pruned(state, site).get(client, rank)) for site, rank in ranks.items()
        }

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the first `rank` columns and rows, and the penalty on their tail."""
        start = factors.prefix(self.name, state, site, rank, scale)
        dead = ~(start.b.any(dim=0) | start.a.any(dim=1))
        if dead.any():
            rows = initial_rows(start.shape[1], rank, seed=seed, site=site).to(start.a)
            start = LowRank(start.b, torch.where(dead[:, None], rows, start.a))
        if self.gamma == 1 or self.penalty == 0:
            return SiteAssignment(start)
        return SiteAssignment(start, penalty=(self.penalty, self._rank_to_keep(rank)))

    def weigh(
        self,
        state: State,
        weights: Mapping[str, float],
        norm: Callable[[str], float],
    ) -> Mapping[str, float]:
        """Return ‖ΔW_i‖_F per client; equal weights if all updates are zero.

        A zero among others counts as a trillionth of the largest, since it may be alone at a site.
        """
        norms = {client: norm(client) for client in weights}
        least = 1e-12 * max(norms.values())
        return {client: max(size, least) or 1.0 for client, size in norms.items()}

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with both factors averaged at this site, and the ranks given up."""
        old = factors.server_factors(self.name, state, site)
        b, a = torch.zeros_like(old.b).double(), torch.zeros_like(old.a).double()
        dtype = torch.float32
        pruned = dict(_pruned(state, site))
        for change in factors.changes(self.name, site, old, contributions):
            r = self._surviving(change)
            if r < change.result.rank:
                pruned[change.client] = r
            b[:, :r] += change.weight * change.result.b[:, :r]
            a[:r] += change.weight * change.result.a[:r]
            dtype = torch.promote_types(dtype, change.result.b.dtype)
        mean = LowRank(b.to(dtype), a.to(dtype))
        report = SiteReport(energy=mean.norm() ** 2, discarded=0.0)
        scalars: dict[str, Json] = {_key(site): dict(sorted(pruned.items()))} if pruned else {}
        return state.update(factors.tensors_of(site, mean), scalars), report

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state with B̄Ā = these updates: B̄ = UΣ, Ā = Vᵀ, fresh rows where Σ is zero."""
        return factors.started(self.name, state, updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return B̄Ā at every site, its factors ordered by singular value."""
        return factors.ordered(self.name, state)

    def _rank_to_keep(self, rank: int) -> int:
        """⌊γr⌋, at least 1; a product within rounding below a whole number counts as that."""
        return max(1, math.floor(self.gamma * rank + 1e-9))

    def _surviving(self, change: Change) -> int:
        """The rank that a client keeps at a site after its training."""
        keep = self._rank_to_keep(change.result.rank)
        before, after = _tail(change.start, keep), _tail(change.result, keep)
        return keep if after < before else change.result.rank


def _tail(factors_: LowRank, keep: int) -> float:
    """‖B[:, kept:]‖_F ‖A[kept:]‖_F in float64."""
    b, a = factors_.b[:, keep:].double(), factors_.a[keep:].double()
    return float(b.norm() * a.norm())


def _key(site: str) -> str:
    return f"{site}/pruned"


def _pruned(state: State, site: str) -> Mapping[str, int]:
    return cast("Mapping[str, int]", state.scalars.get(_key(site), {}))
