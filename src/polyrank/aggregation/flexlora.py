"""FlexLoRA: clients of unequal ranks, one exact sum, one factorisation, a prefix for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation import spectral
from polyrank.aggregation.choose import choose
from polyrank.aggregation.incoming import Change, incoming
from polyrank.aggregation.increments import incremented
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank


@dataclass(frozen=True)
class FlexLoRA(Rule):
    """Sum the clients' full-size updates, factor the sum once, send each client a prefix of it.

    With s_i B_i A_i the effective update of client i, weights w_i and D = U Σ Vᵀ the server's
    aggregate, kept at `server_rank`, client i starts from T_{r_i}(D), the best approximation of its
    rank. `mode` says how the updates become the next D:

    - ``replace`` (the paper's): D⁺ = Σ w_i s_i B_i A_i. Under mixed ranks a direction that only
      some clients hold shrinks every round, even if nobody trains: σ_j ← σ_j·Σ_{r_i ≥ j} w_i.
    - ``delta``: D⁺ = D + Σ w_i (s_i B_i A_i − start_i), start_i being what was in fact sent, after
      rounding on the wire. Rounds without training are fixed points.
    - ``tail-in-base``: as ``delta``, and the client also holds D − T_{r_i}(D) as a low-rank term
      that is active but not trained, so that it starts exactly at D.

    `split` says where Σ goes: ``left`` is B = UΣ/s, A = Vᵀ (the released code), ``balanced`` is
    B = U√Σ/√s, A = √ΣVᵀ/√s. In both, a direction with σ_j ≤ 1e-6·σ₁ is sent as B_j = 0 and A_j a
    random row of LoRA's initial scale, the same for all clients of a round. `factorisation` is a
    method of `polyrank.algebra.factorise`.

    State: ``site/u`` m×k, ``site/s`` [k], ``site/v`` n×k at the server's rank k; float32, or
    float64 once contributions are. Weights must sum to one at every site.

    Source: Bai et al., arXiv 2402.11505, and its released code; the shrinking also in
    arXiv 2602.13486. ``delta`` and ``tail-in-base`` were found here and independently elsewhere:
    increments on a full-rank D in FedHL (arXiv 2505.18494) and FedHera (ICML 2026), the frozen tail
    in FedHera; subtracting the start as it was sent, after rounding, is ours. Raises RuleError for
    an unknown mode, split or factorisation.
    """

    mode: str = "replace"
    split: str = "left"
    factorisation: str = "auto"

    def __post_init__(self) -> None:
        choose("FlexLoRA mode", self.mode, _MODES)
        spectral.check_options("FlexLoRA", self.split, self.factorisation)

    @property
    def name(self) -> str:
        """``flexlora``, ``flexlora:delta`` or ``flexlora:tail-in-base``."""
        return _MODES[self.mode].name

    def init(self, spec: FleetSpec) -> State:
        """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
        return spectral.beginning(self.name, spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return T_rank(D), with random rows where it has no direction, s folded into B."""
        server = spectral.read(self.name, state, site)
        start = spectral.prefix(self.name, site, server, rank, scale, seed, self.split)
        frozen = server.tail(min(rank, server.alive)) if _MODES[self.mode].tail else None
        return SiteAssignment(start, frozen)

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the next D at this site, and how much of it the cut took."""
        server = spectral.read(self.name, state, site)
        changes = incoming(self.name, site, server.shape, contributions)
        terms = _MODES[self.mode].terms(server.lowrank(), changes)
        return spectral.merged(state, site, server, terms, self.factorisation)

    def elsewhere(self, state: State, sites: Collection[str]) -> Adapter[LowRank]:
        """Return, in ``tail-in-base``, the whole D at the sites where the client trains nothing."""
        if not _MODES[self.mode].tail:
            return Adapter({})
        others = [site for site in spectral.sites(state) if site not in sites]
        tails = {site: spectral.read(self.name, state, site).tail(0) for site in others}
        return Adapter({site: tail for site, tail in tails.items() if tail is not None})

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:
        """Return the server's rank where clients hold the rest of D, and nothing otherwise."""
        return spec.server_rank if _MODES[self.mode].tail else {}

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state with D = these updates, cut to the server's rank."""
        return spectral.started(self.name, state, updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return D at every site as B = UΣ, A = Vᵀ, at the server's rank."""
        return spectral.adapter(self.name, state)


def _replaced(_server: LowRank, changes: Iterator[Change]) -> Iterator[LowRank]:
    return (change.result.scale(change.weight) for change in changes)


@dataclass(frozen=True)
class _Mode:
    """What a mode changes: the terms of the next D, and whether a client holds the tail of D."""

    name: str
    terms: Callable[[LowRank, Iterator[Change]], Iterator[LowRank]]
    tail: bool = False


_MODES = {
    "replace": _Mode("flexlora", _replaced),
    "delta": _Mode("flexlora:delta", incremented),
    "tail-in-base": _Mode("flexlora:tail-in-base", incremented, tail=True),
}
