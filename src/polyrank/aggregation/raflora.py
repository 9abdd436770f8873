"""raFLoRA: every direction averaged over the clients that hold it, then one factorisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation import spectral
from polyrank.aggregation.incoming import Change, incoming
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Factorisation, LowRank
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class RaFLoRA(Rule):
    """Divide column j of every client's product by the weight of those that hold a column j.

    With c_j = Σ_{i: r_i ≥ j} w_i and b_ij, a_ij the j-th column of s_i B_i and row of A_i,

        D⁺ = Σ_i w_i Σ_{j ≤ r_i} (1/c_j) b_ij a_ijᵀ,

    which is factored once and sent as FlexLoRA does, T_{r_i}(D) to client i. FlexLoRA's ``replace``
    lets direction j shrink by c_j in every round; here it does not, so rounds without training are
    fixed points. A direction that no client of the round holds (c_j = 0) stays as the server has
    it [I]. With equal ranks this is ``flexlora``. `split` and `factorisation` are FlexLoRA's.

    D⁺ depends on the gauge where ranks differ: B_i G, G⁻¹ A_i is the same update of client i, but
    its columns are weighed differently. Columns of different clients mean the same direction only
    as far as training leaves them near the common start that all were sent, U Σ and Vᵀ. And D⁺ is
    not the mean update, on purpose: what one strong client trains beyond the others' ranks counts
    as much as what all train together, its noise included. ``flexlora:delta`` stops the shrinking
    too, and averages increments, which have no gauge.

    The c_j need all ranks, so the updates of a site are in memory together, R(m+n) numbers.

    State: ``site/u`` m×k, ``site/s`` [k], ``site/v`` n×k at the server's rank k. Weights must sum
    to one at every site.

    Source: Wu et al., arXiv 2602.13486 (raFLoRA), and RB-LoRA (EACL Findings 2026), which arrives
    at the same weights. Raises RuleError for an unknown split or factorisation.
    """

    split: str = "left"
    factorisation: str = "auto"

    def __post_init__(self) -> None:
        spectral.check_options("raflora", self.split, self.factorisation)

    @property
    def name(self) -> str:
        """``raflora``."""
        return "raflora"

    def init(self, spec: FleetSpec) -> State:
        """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
        return spectral.beginning(self.name, spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return T_rank(D), with random rows where it has no direction, s folded into B."""
        server = spectral.read(self.name, state, site)
        return SiteAssignment(
            spectral.prefix(self.name, site, server, rank, scale, seed, self.split)
        )

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the next D at this site, and how much of it the cut took."""
        server = spectral.read(self.name, state, site)
        changes = [*incoming(self.name, site, server.shape, contributions)]
        terms = _terms(server, changes)
        return spectral.merged(state, site, server, terms, self.factorisation)

    def started(self, state: State, updates: Mapping[str, Factorisation]) -> State:
        """Return the state with D = these updates, cut to the server's rank."""
        return spectral.started(self.name, state, updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return D at every site as B = UΣ, A = Vᵀ, at the server's rank."""
        return spectral.adapter(self.name, state)


def _terms(server: spectral.ServerSVD, changes: list[Change]) -> Iterator[LowRank]:
    """Yield the terms of D⁺: each client's columns times w_i/c_j, and the columns of nobody."""
    ranks = [change.result.rank for change in changes]
    c = torch.zeros(max(ranks), dtype=torch.float64)
    for change, rank in zip(changes, ranks, strict=True):
        c[:rank] += change.weight
    for change, rank in zip(changes, ranks, strict=True):
        b = change.result.b
        yield LowRank(b * (change.weight / c[:rank]).to(b), change.result.a)
    idle = server.tail(max(ranks))
    if idle is not None:
        yield idle
