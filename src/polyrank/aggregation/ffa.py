"""FFA-LoRA: A frozen and shared, B averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyrank.aggregation import factors
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, LowRank
from polyrank.errors import UpdateError
from polyrank.lazy_torch import torch


@dataclass(frozen=True)
class FFA(Rule):
    """Freeze one random A for all, train and average B alone.

    A client of rank r has the first r rows of A and trains the first r columns of B. A is drawn
    from the fleet's seed, so it never travels. With one A, averaging is exact: Σ w_i B_i A is the
    average update, and the rule is linear in what clients send, so that it composes with secure
    sums.

    With unequal ranks the mean of zero-padded B shrinks column j by c_j = Σ_{r_i ≥ j} w_i in every
    round, trained or not. By default only what clients changed is averaged,
    B⁺ = B + Σ w_i pad(B_i − start_i), start_i as really sent, after rounding on the wire; products
    obey the same equation exactly, D⁺ = D + Σ w_i (B_i A_i − start_i A_i), since rows are nested.
    Without `correction`, B⁺ = Σ w_i pad(B_i). With all ranks at the server's, both are one.

    Rows of A are from U(−1/√n, 1/√n), LoRA's initial A, not orthonormal: then a step on B moves as
    far as it does in LoRA's first steps [I].

    State: ``site/b`` m×k with s folded in, ``site/a`` k×n, fixed, at the server's rank k. No client
    may exceed the server's rank.

    Source: Sun et al., arXiv 2403.12313; nested ranks and the correction are ours.
    """

    correction: bool = True

    @property
    def name(self) -> str:
        """``ffa``, or ``ffa:replace`` without the correction."""
        return "ffa" if self.correction else "ffa:replace"

    @property
    def excludes(self) -> Mapping[str, str]:
        """SLoRA."""
        return {
            "slora": "its start has an A of its own, and here A is drawn from a seed and never sent"
        }

    def init(self, spec: FleetSpec) -> State:
        """Return B = 0 and the A of the run; RankError for a client above the server's rank."""
        return factors.beginning(self.name, spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the first `rank` columns of B, to be trained, and rows of A, fixed."""
        return SiteAssignment(factors.prefix(self.name, state, site, rank, scale), train="b")

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the next B; UpdateError for an update that changed A."""
        old = factors.server_factors(self.name, state, site)
        b = torch.zeros_like(old.b).double()
        dtype = old.b.dtype
        with_a = _with_fixed_a(self.name, site, contributions)
        for change in factors.changes(self.name, site, old, with_a):
            r = change.result.rank
            b[:, :r] += change.weight * change.result.b.double()
            if self.correction:
                b[:, :r] -= change.weight * change.start.b.double()
            dtype = torch.promote_types(dtype, change.result.b.dtype)
        if self.correction:
            b += old.b
        new = LowRank(b.to(dtype), old.a.to(dtype))
        report = SiteReport(energy=new.norm() ** 2, discarded=0.0)
        return state.update(factors.tensors_of(site, new)), report

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return BA at every site, its factors ordered by singular value."""
        return factors.ordered(self.name, state)


def _with_fixed_a(
    rule: str, site: str, contributions: Iterator[Contribution]
) -> Iterator[Contribution]:
    """Yield the contributions; UpdateError for one whose A is another than it was sent."""
    for contribution in contributions:
        start, result = contribution.sent.start, contribution.result
        if (
            isinstance(start, LowRank)
            and isinstance(result, LowRank)
            and not torch.equal(result.a, start.a.to(result.a.dtype))
        ):
            raise UpdateError(
                f"{rule}: client {contribution.client!r} returned another A at {site!r} than "
                "it was sent; A is fixed, train B alone"
            )
        yield contribution
