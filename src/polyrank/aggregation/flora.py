"""FLoRA: updates are stacked and merged into an exact sum; adapters begin anew, or are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from polyrank.aggregation.client_factors import at_rank, initial_rows, own_factors, own_tensors
from polyrank.aggregation.incoming import (
    Change,
    checked_fleet,
    checked_rank,
    checked_scale,
    incoming,
)
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import (
    Contribution,
    FleetSpec,
    Json,
    SiteAssignment,
    SiteReport,
    State,
)
from polyrank.algebra import Adapter, Delta, Dense, LowRank
from polyrank.errors import RuleError, SiteError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FLoRA(Rule):
    """Stack the clients' factors, which is their exact sum, and merge it into the base.

        D⁺ = D + [w_1 s_1 B_1 … w_N s_N B_N][A_1; …; A_N] = D + Σ w_i s_i B_i A_i,

    whatever the ranks. Every round every client begins with D active at all sites, also at those
    that it does not train (`merged`), B = 0 and a fresh A, the same for all clients of the round.
    Nothing is truncated, and nothing of a round's factors survives but their product;
    re-initialisation costs the first steps of every round. HSplitLoRA's noise-free aggregation is
    this rule [S], and ``noise-free`` another name for it.

    Without `reinitialise` a client goes on with the factors that it returned last, which the state
    keeps for it (ours). Their product is part of D already, so the client also holds its negative,
    active and not trained, and begins at base + D like everyone:

        start_i = B_i A_i,  frozen_i = −B_i A_i,  D⁺ = D + Σ w_i (s_i B_i' A_i' − start_i),

    start_i as really sent. At another rank than before it begins with a prefix, or with zero
    columns of B and fresh rows of A beside its own. Who never took part begins at B = 0 with a
    fresh A; so in the first round the two are one. The state then grows by one update for every
    client that ever took part, and every checkpoint with it. The frozen term is the start's
    negative, which a client can make itself, so it does not count as travelling; and since clients
    keep nothing, the start does. A stack holds what each client returned and what it began with.

    The loaded base is never written: D is kept apart, dense, in float32 or wider (float64 once
    contributions are). It is dense from the first round on: one forward pass of training needs it
    dense anyway, one tensor serves all clients, and a stack is thinner only for few rounds.

    *Download.* A client that last took part in round t lacks the stacks of rounds t, t+1, …; at
    each site it gets them as they were sent, or D itself where that is smaller: `catch_up`. One
    that never took part lacks all. One whose update was not accepted counts as not having taken
    part. The server notes when a client took part, not at which sites it then held D: a client
    that comes to hold other sites is taken to know them since its last round.

    State: ``site/merged`` m×n; scalars ``site/stacks``, the bytes of a site's stacks up to the
    start of every round, ``rounds``, how many are over, and ``seen``, each client's last round.
    Without `reinitialise` also ``site/kept/CLIENT/b`` and ``site/kept/CLIENT/a``.

    Source: Wang et al., arXiv 2409.05976; as noise-free aggregation Lin et al., arXiv 2505.02795
    [S]. That re-initialisation adds noise: arXiv 2602.16936.
    """

    reinitialise: bool = field(default=True, metadata={"later": True})

    @property
    def name(self) -> str:
        """``flora``, or ``flora:keep`` without `reinitialise`."""
        return "flora" if self.reinitialise else "flora:keep"

    @property
    def excludes(self) -> Mapping[str, str]:
        """SLoRA; and one adapter for all split clients, where each keeps its own."""
        if self.reinitialise:
            return {
                "slora": "adapters are re-initialised every round, so its start would be thrown "
                "away"
            }
        return {
            "slora": "clients go on with their own factors, so its start would be nobody's",
            "shared": "every client goes on with its own factors, so there is no common start",
        }

    def init(self, spec: FleetSpec) -> State:
        """Return D = 0 at every site; SiteError or RankError for ranks that do not fit."""
        checked_fleet(self.name, spec)
        tensors = {_key(site): torch.zeros(shape) for site, shape in spec.shapes.items()}
        stacks: dict[str, Json] = {f"{site}{_STACKS}": [0] for site in spec.shapes}
        return State(tensors, {**stacks, "rounds": 0, "seen": {}})

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return B = 0 and a fresh A."""
        server = _merged(self.name, state, site)
        m, n = server.shape
        checked_rank(self.name, site, rank, (m, n))
        checked_scale(self.name, site, scale)
        a = initial_rows(n, rank, seed=seed, site=site).to(server.dtype)
        return SiteAssignment(LowRank(server.new_zeros(m, rank), a))

    def personal(self, state: State, client: str) -> bool:
        """Whether factors are kept for the client."""
        if self.reinitialise:
            return False
        return any(own_factors(state, site, client) is not None for site in _sites(state))

    def assign_own(
        self, state: State, client: str, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the client's own factors and their negative, frozen; as for all if it has none."""
        own = None if self.reinitialise else own_factors(state, site, client)
        if own is None:
            return self.assign_site(state, site, rank, scale, seed)
        checked_rank(self.name, site, rank, own.shape)
        checked_scale(self.name, site, scale)
        start = at_rank(own, rank, seed=seed, site=site)
        return SiteAssignment(start, frozen=LowRank(-start.b, start.a))

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the round's updates added to D at this site."""
        old = _merged(self.name, state, site)
        shape = (old.shape[0], old.shape[1])
        travelled: list[int] = []
        returned: dict[str, Delta] = {}
        noted = _noted(contributions, travelled, returned)
        new = Dense(_added(old, incoming(self.name, site, shape, noted)))
        own: dict[str, Tensor] = {}
        if not self.reinitialise:
            for client, factors in returned.items():
                own |= own_tensors(site, client, cast("LowRank", factors))  # `incoming` looked.
        before = _stacks(self.name, state, site)
        now: list[Json] = [*before[: _rounds(state) + 1], before[-1] + sum(travelled)]
        report = SiteReport(energy=new.norm() ** 2, discarded=0.0)
        return state.update({_key(site): new.matrix, **own}, {f"{site}{_STACKS}": now}), report

    def conclude(self, state: State, clients: Sequence[str]) -> State:
        """Note that these clients hold D as it was when the round began."""
        over = _rounds(state)
        scalars: dict[str, Json] = {"rounds": over + 1}
        scalars["seen"] = dict(sorted({**_seen(state), **dict.fromkeys(clients, over)}.items()))
        for site in _sites(state):
            stacks = _stacks(self.name, state, site)
            idle: list[Json] = [stacks[-1]] * (over + 2 - len(stacks))
            scalars[f"{site}{_STACKS}"] = [*stacks, *idle]
        return state.update({}, scalars)

    def merged(self, state: State) -> Adapter[Dense]:
        """Return D at every site, once there is one."""
        some = any(_stacks(self.name, state, site)[-1] for site in _sites(state))
        return self._whole(state) if some else Adapter({})

    def catch_up(self, state: State, client: str, sites: Collection[str] | None = None) -> int:
        """Return the bytes of the stacks that the client lacks, at each site at most those of D."""
        last = _seen(state).get(client, 0)
        missed = 0
        for site in _sites(state) if sites is None else sites:
            stacks = _stacks(self.name, state, site)
            missed += min(stacks[-1] - stacks[last], state.tensors[_key(site)].nbytes)
        return missed

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:
        """Return the largest rank of a client per site, where clients hold their own negative."""
        if self.reinitialise:
            return {}
        return {
            site: max((own[site] for own in spec.ranks.values() if site in own), default=1)
            for site in spec.shapes
        }

    def growth(self, spec: FleetSpec) -> int:
        """Return the bytes of one float32 update of every client, where they are kept."""
        if self.reinitialise:
            return 0
        every = (item for own in spec.ranks.values() for item in own.items())
        return sum(4 * rank * sum(spec.shapes[site]) for site, rank in every)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return D at every site, dense."""
        return self._whole(state)

    def _whole(self, state: State) -> Adapter[Dense]:
        return Adapter({site: Dense(_merged(self.name, state, site)) for site in _sites(state)})


_SUFFIX = "/merged"
_STACKS = "/stacks"
_BATCH = 256


def _added(total: Tensor, changes: Iterator[Change]) -> Tensor:
    """Return total + Σ w_i (result_i − start_i) in the widest dtype, small ranks batched."""
    new, waiting = total.clone(), list[LowRank]()
    for change in changes:
        waiting.append(_increment(change).scale(change.weight))
        if sum(term.rank for term in waiting) >= _BATCH:
            new = _with(new, waiting)
    return _with(new, waiting)


def _increment(change: Change) -> LowRank:
    """result − start = (B' − B)A' + B(A' − A), whose terms are as small as what was changed."""
    start, result = change.start, change.result
    if not start.b.any():
        return result
    return LowRank(result.b - start.b, result.a) + LowRank(start.b, result.a - start.a)


def _with(total: Tensor, waiting: list[LowRank]) -> Tensor:
    """Add the waiting terms in place, as far as the dtype allows, and empty the list."""
    for dtype in sorted({term.b.dtype for term in waiting}, key=lambda dtype: dtype.itemsize):
        stack = LowRank.stack(term for term in waiting if term.b.dtype == dtype)
        total = total.to(torch.promote_types(total.dtype, dtype))
        total.addmm_(stack.b.to(total.dtype), stack.a.to(total.dtype))
    waiting.clear()
    return total


def _noted(
    contributions: Iterator[Contribution], nbytes: list[int], returned: dict[str, Delta]
) -> Iterator[Contribution]:
    """Yield the contributions, noting what each adds to the stack and what its client returned."""
    for contribution in contributions:
        if contribution.weight > 0:
            start = contribution.sent.start.nbytes if contribution.sent.frozen is not None else 0
            nbytes.append(contribution.result.nbytes + start)
        returned[contribution.client] = contribution.result
        yield contribution


def _key(site: str) -> str:
    return f"{site}{_SUFFIX}"


def _merged(rule: str, state: State, site: str) -> Tensor:
    try:
        return state.tensors[_key(site)]
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None


def _sites(state: State) -> list[str]:
    return [name.removesuffix(_SUFFIX) for name in state.tensors if name.endswith(_SUFFIX)]


def _stacks(rule: str, state: State, site: str) -> list[int]:
    """Bytes of a site's stacks before round 0, 1, … and, if it is merged, after this one."""
    try:
        return cast("list[int]", state.scalars[f"{site}{_STACKS}"])
    except KeyError:
        if _key(site) not in state.tensors:
            raise SiteError(f"{rule}: no site {site!r} in the state") from None
        raise RuleError(
            f"{rule}: the state does not tell the bytes of stacks at {site!r}, as older versions "
            "did not; its adapter can be exported, but start the run anew to go on"
        ) from None


def _rounds(state: State) -> int:
    return cast("int", state.scalars["rounds"])


def _seen(state: State) -> Mapping[str, int]:
    return cast("Mapping[str, int]", state.scalars["seen"])
