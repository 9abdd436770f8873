"""FlexLoRA: clients of unequal ranks, one exact sum, one factorisation, a prefix for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.aggregation.choose import choose
from polyrank.aggregation.fresh import fresh_rows
from polyrank.aggregation.incoming import (
    Change,
    checked_fleet,
    checked_rank,
    checked_scale,
    incoming,
)
from polyrank.aggregation.increments import incremented
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, Dealt, FleetSpec, SiteReport, State
from polyrank.algebra import METHODS, Adapter, Delta, Factorisation, LowRank, factorise
from polyrank.errors import SiteError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# A direction with σ_j ≤ DEAD·σ₁ carries nothing worth sending and, split evenly, would never train.
DEAD = 1e-6


@dataclass(frozen=True)
class FlexLoRA(Rule):
    """Sum the clients' full-size updates, factor the sum once, deal each client a prefix of it.

    With s_i B_i A_i the effective update of client i, weights w_i and D = U Σ Vᵀ the server's
    aggregate, kept at `server_rank`, client i starts from T_{r_i}(D), the best approximation of its
    rank. `mode` says how the updates become the next D:

    - ``replace`` (the paper's): D⁺ = Σ w_i s_i B_i A_i. Under mixed ranks a direction that only
      some clients hold shrinks every round, even if nobody trains: σ_j ← σ_j·Σ_{r_i ≥ j} w_i.
    - ``delta`` (ours): D⁺ = D + Σ w_i (s_i B_i A_i − start_i), start_i being what was in fact
      dealt, after rounding on the wire. Rounds without training are fixed points.
    - ``tail-in-base`` (ours): as ``delta``, and the client also holds D − T_{r_i}(D) as a low-rank
      term that is active but not trained, so that it starts exactly at D.

    `split` says where Σ goes: ``left`` is B = UΣ/s, A = Vᵀ (the released code), ``balanced`` is
    B = U√Σ/√s, A = √ΣVᵀ/√s. In both, a direction with σ_j ≤ 1e-6·σ₁ is dealt as B_j = 0 and A_j a
    fresh row of LoRA's initial scale, the same for all clients of a round. `factorisation` is a
    method of `polyrank.algebra.factorise`.

    State: ``site/u`` m×k, ``site/s`` [k], ``site/v`` n×k at the server's rank k; float32, or
    float64 once contributions are. Weights must sum to one at every site.

    Source: Bai et al., arXiv 2402.11505, and its released code; the shrinking also in
    arXiv 2602.13486. Raises RuleError for an unknown mode, split or factorisation.
    """

    mode: str = "replace"
    split: str = "left"
    factorisation: str = "auto"

    def __post_init__(self) -> None:
        choose("FlexLoRA mode", self.mode, _MODES)
        choose("FlexLoRA split", self.split, _SPLITS)
        choose("FlexLoRA factorisation", self.factorisation, METHODS)

    @property
    def name(self) -> str:
        """``flexlora``, ``flexlora:delta`` or ``flexlora:tail-in-base``."""
        return _MODES[self.mode].name

    def init(self, spec: FleetSpec) -> State:
        """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
        checked_fleet(self.name, spec)
        tensors: dict[str, Tensor] = {}
        for site, (m, n) in spec.shapes.items():
            k = spec.server_rank[site]
            zero = _Held(torch.zeros(m, k), torch.zeros(k), torch.zeros(n, k))
            tensors |= zero.tensors(site)
        return State(tensors)

    def deal_site(self, state: State, site: str, rank: int, scale: float, seed: int) -> Dealt:
        """Return T_rank(D), with fresh rows where it has no direction, s folded into B."""
        held = _held(self.name, state, site)
        checked_rank(self.name, site, rank, held.shape)
        checked_scale(self.name, site, scale)
        alive = min(rank, held.alive)
        on_u, on_v = _SPLITS[self.split](held.s[:alive], scale)
        b = held.u.new_zeros(held.shape[0], rank)
        b[:, :alive] = held.u[:, :alive] * on_u
        a = held.v.new_empty(rank, held.shape[1])
        a[:alive] = (held.v[:, :alive] * on_v).T
        if alive < rank:
            a[alive:] = fresh_rows(held.shape[1], rank, seed=seed, site=site)[alive:]
        return Dealt(LowRank(b, a), _MODES[self.mode].frozen(held, alive))

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the next D at this site, and how much of it the cut took."""
        held = _held(self.name, state, site)
        accepted = incoming(self.name, site, held.shape, contributions)
        found = factorise(
            _MODES[self.mode].terms(held.lowrank(), accepted),
            held.rank,
            method=self.factorisation,
            warm=held.v[:, : held.alive] if held.alive else None,
        )
        kept = found.padded(held.rank)
        return (
            state.update(_Held(kept.u, kept.s, kept.v).tensors(site)),
            SiteReport(found.energy, found.discarded, found.method),
        )

    def elsewhere(self, state: State, sites: Collection[str]) -> Adapter[LowRank]:
        """Return, in ``tail-in-base``, the whole D at the sites where the client trains nothing."""
        tail = _MODES[self.mode].frozen
        others = [site for site in _sites(state) if site not in sites]
        found = {site: tail(_held(self.name, state, site), 0) for site in others}
        return Adapter({site: whole for site, whole in found.items() if whole is not None})

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:
        """Return the server's rank where clients hold the rest of D, and nothing otherwise."""
        return spec.server_rank if _MODES[self.mode].frozen is _tail else {}

    def started(self, state: State, found: Mapping[str, Factorisation]) -> State:
        """Return the state with D = these updates, cut to the server's rank."""
        tensors: dict[str, Tensor] = {}
        for site, given in found.items():
            k = _held(self.name, state, site).rank
            kept = given.truncated(k).padded(k)
            tensors |= _Held(kept.u, kept.s, kept.v).tensors(site)
        return state.update(tensors)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return D at every site as B = UΣ, A = Vᵀ, at the server's rank."""
        return Adapter({s: _held(self.name, state, s).lowrank() for s in _sites(state)})


@dataclass(frozen=True)
class _Held:
    """The server's D at one site: u m×k, s [k] descending, v n×k."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[0]

    @property
    def rank(self) -> int:
        return self.s.shape[0]

    @property
    def alive(self) -> int:
        """How many directions lie above DEAD·σ₁."""
        return int((self.s > DEAD * self.s[0]).sum())

    def lowrank(self) -> LowRank:
        return LowRank(self.u * self.s, self.v.T)

    def tensors(self, site: str) -> dict[str, Tensor]:
        return {f"{site}/u": self.u, f"{site}/s": self.s, f"{site}/v": self.v}


def _sites(state: State) -> list[str]:
    return [name.removesuffix("/u") for name in state.tensors if name.endswith("/u")]


def _held(rule: str, state: State, site: str) -> _Held:
    try:
        return _Held(*(state.tensors[f"{site}/{what}"] for what in "usv"))
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None


def _replaced(_held: LowRank, contributions: Iterator[Change]) -> Iterator[LowRank]:
    return (one.result.scale(one.weight) for one in contributions)


def _no_tail(_held: _Held, _dealt: int) -> LowRank | None:
    return None


def _tail(held: _Held, dealt: int) -> LowRank | None:
    """D without its first `dealt` directions; None if nothing is left."""
    end = int((held.s > 0).sum())
    if end <= dealt:
        return None
    return LowRank(held.u[:, dealt:end] * held.s[dealt:end], held.v[:, dealt:end].T)


@dataclass(frozen=True)
class _Mode:
    """What a mode changes: the terms of the next D, and what a client holds frozen."""

    name: str
    terms: Callable[[LowRank, Iterator[Change]], Iterator[LowRank]]
    frozen: Callable[[_Held, int], LowRank | None]


_MODES = {
    "replace": _Mode("flexlora", _replaced, _no_tail),
    "delta": _Mode("flexlora:delta", incremented, _no_tail),
    "tail-in-base": _Mode("flexlora:tail-in-base", incremented, _tail),
}


def _left(s: Tensor, _scale: float) -> tuple[Tensor, Tensor]:
    return s, torch.ones_like(s)


def _balanced(s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """With s folded into B: U√Σ/√s·s = U√(sΣ)."""
    return (s * scale).sqrt(), (s / scale).sqrt()


_SPLITS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "left": _left,
    "balanced": _balanced,
}
