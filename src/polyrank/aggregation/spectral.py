"""The server's D at every site as U Σ Vᵀ, for rules that factor a sum and send prefixes of it.

State: ``site/u`` m×k, ``site/s`` [k] descending, ``site/v`` n×k at the server's rank k; float32, or
float64 once contributions are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.aggregation.choose import choose
from polyrank.aggregation.client_factors import initial_rows
from polyrank.aggregation.incoming import checked_fleet, checked_rank, checked_scale
from polyrank.aggregation.types import FleetSpec, SiteReport, State
from polyrank.algebra import METHODS, Adapter, Delta, Factorisation, LowRank, factorise
from polyrank.errors import SiteError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# A direction with σ_j ≤ DEAD·σ₁ carries nothing worth sending and, split evenly, would never train.
DEAD = 1e-6


@dataclass(frozen=True)
class ServerSVD:
    """The server's D at one site: u m×k, s [k] descending, v n×k."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of D."""
        return self.u.shape[0], self.v.shape[0]

    @property
    def rank(self) -> int:
        """The server's rank k."""
        return self.s.shape[0]

    @property
    def alive(self) -> int:
        """The number of directions above DEAD·σ₁."""
        return int((self.s > DEAD * self.s[0]).sum())

    def lowrank(self) -> LowRank:
        """Return D as B = UΣ, A = Vᵀ."""
        return LowRank(self.u * self.s, self.v.T)

    def tail(self, rank: int) -> LowRank | None:
        """Return D − T_rank(D); None if it is zero."""
        end = int((self.s > 0).sum())
        if end <= rank:
            return None
        return LowRank(self.u[:, rank:end] * self.s[rank:end], self.v[:, rank:end].T)

    def tensors(self, site: str) -> dict[str, Tensor]:
        """Return the state's tensors of this site."""
        return {f"{site}/u": self.u, f"{site}/s": self.s, f"{site}/v": self.v}


def check_options(rule: str, split: str, factorisation: str) -> None:
    """Raise RuleError for an unknown way to share out Σ, or an unknown factorisation."""
    choose(f"{rule} split", split, _SHARES_OF_SIGMA)
    choose(f"{rule} factorisation", factorisation, METHODS)


def beginning(rule: str, spec: FleetSpec) -> State:
    """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
    checked_fleet(rule, spec)
    tensors: dict[str, Tensor] = {}
    for site, (m, n) in spec.shapes.items():
        k = spec.server_rank[site]
        tensors |= ServerSVD(torch.zeros(m, k), torch.zeros(k), torch.zeros(n, k)).tensors(site)
    return State(tensors)


def sites(state: State) -> list[str]:
    """Return the sites of a state."""
    return [name.removesuffix("/u") for name in state.tensors if name.endswith("/u")]


def read(rule: str, state: State, site: str) -> ServerSVD:
    """Return the server's D at a site; SiteError if the state has none."""
    try:
        return ServerSVD(*(state.tensors[f"{site}/{name}"] for name in "usv"))
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None


def prefix(
    rule: str, site: str, server: ServerSVD, rank: int, scale: float, seed: int, split: str
) -> LowRank:
    """Return T_rank(D) with s folded into B.

    A direction with σ_j ≤ DEAD·σ₁ has B_j = 0 and as A_j a random row of LoRA's initial scale, the
    same for all clients of a round. `split` is ``left`` (B = UΣ/s, A = Vᵀ) or ``balanced``
    (B = U√Σ/√s, A = √ΣVᵀ/√s). Raises RankError for a rank, RuleError for a scale that cannot be.
    """
    checked_rank(rule, site, rank, server.shape)
    checked_scale(rule, site, scale)
    alive = min(rank, server.alive)
    on_u, on_v = _SHARES_OF_SIGMA[split](server.s[:alive], scale)
    b = server.u.new_zeros(server.shape[0], rank)
    b[:, :alive] = server.u[:, :alive] * on_u
    a = server.v.new_empty(rank, server.shape[1])
    a[:alive] = (server.v[:, :alive] * on_v).T
    if alive < rank:
        a[alive:] = initial_rows(server.shape[1], rank, seed=seed, site=site)[alive:]
    return LowRank(b, a)


def merged(
    state: State, site: str, server: ServerSVD, terms: Iterator[LowRank], factorisation: str
) -> tuple[State, SiteReport]:
    """Return the state with D = Σ terms, cut to the server's rank, and how much the cut took."""
    result = factorise(
        terms,
        server.rank,
        method=factorisation,
        warm=server.v[:, : server.alive] if server.alive else None,
    )
    new = result.padded(server.rank)
    report = SiteReport(result.energy, result.discarded, result.method)
    return state.update(ServerSVD(new.u, new.s, new.v).tensors(site)), report


def started(rule: str, state: State, updates: Mapping[str, Factorisation]) -> State:
    """Return the state with D = these updates, cut to the server's rank."""
    tensors: dict[str, Tensor] = {}
    for site, update in updates.items():
        k = read(rule, state, site).rank
        new = update.truncated(k).padded(k)
        tensors |= ServerSVD(new.u, new.s, new.v).tensors(site)
    return state.update(tensors)


def adapter(rule: str, state: State) -> Adapter[Delta]:
    """Return D at every site as B = UΣ, A = Vᵀ, at the server's rank."""
    return Adapter({site: read(rule, state, site).lowrank() for site in sites(state)})


def _left(s: Tensor, _scale: float) -> tuple[Tensor, Tensor]:
    return s, torch.ones_like(s)


def _balanced(s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """With s folded into B: U√Σ/√s·s = U√(sΣ)."""
    return (s * scale).sqrt(), (s / scale).sqrt()


_SHARES_OF_SIGMA: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "left": _left,
    "balanced": _balanced,
}
"""The factors of U's and V's columns, by the name of the option ``split``."""
