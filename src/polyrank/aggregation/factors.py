"""The server's own B and A, for rules that average factors column by column.

State: ``site/b`` m×k and ``site/a`` k×n at the server's rank k, every s folded into B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from polyrank.aggregation.client_factors import initial_rows
from polyrank.aggregation.incoming import (
    Change,
    checked_fleet,
    checked_rank,
    checked_scale,
    incoming,
)
from polyrank.aggregation.types import Contribution, FleetSpec, State
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank, factorise
from polyrank.errors import RankError, SiteError, UpdateError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def beginning(rule: str, spec: FleetSpec) -> State:
    """Return B = 0 and A random from the fleet's seed, at the server's rank.

    Raises SiteError or RankError for ranks that do not fit, also for a client above the server:
    columns that the server lacks could be neither sent nor averaged.
    """
    checked_fleet(rule, spec)
    for client, ranks in spec.ranks.items():
        for site, rank in ranks.items():
            _checked_within(rule, f"client {client!r} at {site!r}", rank, spec.server_rank[site])
    tensors: dict[str, Tensor] = {}
    for site, (m, n) in spec.shapes.items():
        k = spec.server_rank[site]
        a = initial_rows(n, k, seed=spec.seed, site=site).to(torch.float32)
        tensors |= tensors_of(site, LowRank(torch.zeros(m, k), a))
    return State(tensors)


def tensors_of(site: str, factors: LowRank) -> dict[str, Tensor]:
    """Return the tensors of the state that hold these factors."""
    return {f"{site}/b": factors.b, f"{site}/a": factors.a}


def server_factors(rule: str, state: State, site: str) -> LowRank:
    """Return the server's factors at a site; SiteError if the state has none."""
    try:
        return LowRank(state.tensors[f"{site}/b"], state.tensors[f"{site}/a"])
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None


def prefix(rule: str, state: State, site: str, rank: int, scale: float) -> LowRank:
    """Return the first `rank` columns of B and rows of A; raises as every assignment does."""
    server = server_factors(rule, state, site)
    checked_rank(rule, site, rank, server.shape)
    checked_scale(rule, site, scale)
    _checked_within(rule, f"a client at {site!r}", rank, server.rank)
    return server.prefix(rank)


def changes(
    rule: str, site: str, server: LowRank, contributions: Iterator[Contribution]
) -> Iterator[Change]:
    """Yield what `incoming` lets pass; UpdateError also for a rank above the server's."""
    for change in incoming(rule, site, server.shape, contributions):
        if change.result.rank > server.rank:
            raise UpdateError(
                f"{rule}: an update at {site!r} has rank {change.result.rank}, the server keeps "
                f"{server.rank}; nothing is cut"
            )
        yield change


def started(rule: str, state: State, updates: Mapping[str, Factorisation]) -> State:
    """Return the state with BA = these updates: B = UΣ, A = Vᵀ, the old rows where Σ is zero."""
    tensors: dict[str, Tensor] = {}
    for site, update in updates.items():
        old = server_factors(rule, state, site)
        new = update.truncated(old.rank)
        a = torch.cat([new.v.T, old.a[new.rank :]])
        tensors |= tensors_of(site, LowRank(new.padded(old.rank).lowrank().b.to(a.dtype), a))
    return state.update(tensors)


def ordered(rule: str, state: State) -> Adapter[Delta]:
    """Return BA at every site at the server's rank, its factors ordered by singular value."""
    sites = [name.removesuffix("/b") for name in state.tensors if name.endswith("/b")]
    server = {site: server_factors(rule, state, site) for site in sites}
    return Adapter({s: factorise(d, d.rank).lowrank(d.rank) for s, d in server.items()})


def _checked_within(rule: str, holder: str, rank: int, server: int) -> None:
    if rank > server:
        raise RankError(
            f"{rule}: {holder} has rank {rank}, the server keeps {server}; give the server at "
            "least the fleet's largest rank"
        )
