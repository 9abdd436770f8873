"""SLoRA: some rounds of sparse updates, then any rule from their factors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from polyrank import seeds
from polyrank.aggregation.incoming import checked_finite, checked_rank, checked_scale, weighed
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.types import Contribution, FleetSpec, SiteAssignment, SiteReport, State
from polyrank.algebra import Adapter, Delta, Dense, Factorisation, LowRank, Sparse, factor_dense
from polyrank.errors import RuleError, SiteError, UpdateError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SLoRA(Rule):
    """Train some entries of the matrices themselves for `rounds` rounds, then go on as `inner`.

    *First stage.* The entries of an m×n matrix are put in one random order, drawn from the fleet's
    seed and the site, the same for all clients and rounds; positions never travel. A client of
    rank r trains the first min(mn, r(m+n)) of them, as many numbers as its LoRA factors have, so
    that what clients hold nests as ranks do [I]. The server's values v become

        v⁺ = v + Σ w_i pad(v_i − start_i),

    start_i as really sent: entries that a client does not hold stay, instead of shrinking [D].
    With equal ranks this is the mean of the values, as published.

    *Second stage.* After the last sparse round the sum, ΔW = UΣVᵀ, is factored at the server's rank
    and `inner` starts from it (`Rule.started`); the base is the loaded one again. What the cut to
    that rank takes away is lost: a random sparse matrix has a flat spectrum [D].

    State: that of `inner`, and during the first stage ``site/sparse-values`` [k] and
    ``site/sparse-positions`` int64 [k] for the largest rank of fleet and server; scalar ``slora``:
    rounds done, shapes, server's ranks. `weigh`, `ranks`, `merged` and `catch_up` are those of
    `inner`.

    Source: Babakniya et al., arXiv 2308.06522 [S]. Raises RuleError for less than one round, and
    for a rule that excludes SLoRA.
    """

    inner: Rule
    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RuleError(f"slora: expected at least 1 sparse round, got {self.rounds}")
        reason = self.inner.excludes.get("slora")
        if reason is not None:
            raise RuleError(f"slora: not with the rule {self.inner.name}: {reason}")

    @property
    def name(self) -> str:
        """The inner rule's, and ``+slora``."""
        return f"{self.inner.name}+slora"

    @property
    def mixed_ranks(self) -> bool:
        """As the inner rule."""
        return self.inner.mixed_ranks

    @property
    def excludes(self) -> Mapping[str, str]:
        """As the inner rule, and SLoRA again."""
        return {**self.inner.excludes, "slora": "it is that already"}

    def init(self, spec: FleetSpec) -> State:
        """Return the inner rule's state, and no sparse update yet; raises what that raises."""
        state = self.inner.init(spec)
        tensors: dict[str, Tensor] = {}
        for site, shape in spec.shapes.items():
            server = [spec.server_rank[site], *(r[site] for r in spec.ranks.values() if site in r)]
            positions = _order(shape, spec.seed, site)[: _entries(shape, max(server))].clone()
            tensors |= _tensors(site, torch.zeros(len(positions)), positions)
        shapes = {site: [m, n] for site, (m, n) in spec.shapes.items()}
        stage = {"round": 0, "shapes": shapes, "server_rank": dict(spec.server_rank)}
        return state.update(tensors, {_KEY: stage})  # type: ignore[dict-item]

    def ranks(self, state: State, client: str, ranks: Mapping[str, int]) -> Mapping[str, int]:
        """As the inner rule."""
        return self.inner.ranks(state, client, ranks)

    def personal(self, state: State, client: str) -> bool:
        """As the inner rule; during the sparse rounds nobody is."""
        return not self._sparse(state) and self.inner.personal(state, client)

    def assign_own(
        self, state: State, client: str, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """As the inner rule."""
        return self.inner.assign_own(state, client, site, rank, scale, seed)

    def weigh(
        self, state: State, weights: Mapping[str, float], norm: Callable[[str], float]
    ) -> Mapping[str, float]:
        """As the inner rule."""
        return self.inner.weigh(state, weights, norm)

    def merged(self, state: State) -> Adapter[Dense]:
        """As the inner rule."""
        return self.inner.merged(state)

    def catch_up(self, state: State, client: str, sites: Collection[str] | None = None) -> int:
        """As the inner rule."""
        return self.inner.catch_up(state, client, sites)

    def elsewhere(self, state: State, sites: Collection[str]) -> Adapter[LowRank]:
        """As the inner rule; nothing during the sparse rounds."""
        return Adapter({}) if self._sparse(state) else self.inner.elsewhere(state, sites)

    def frozen_ranks(self, spec: FleetSpec) -> Mapping[str, int]:
        """As the inner rule."""
        return self.inner.frozen_ranks(spec)

    def growth(self, spec: FleetSpec) -> int:
        """As the inner rule."""
        return self.inner.growth(spec)

    def assign_site(
        self, state: State, site: str, rank: int, scale: float, seed: int
    ) -> SiteAssignment:
        """Return the first entries of the order, as many as the rank's factors have; then inner."""
        if not self._sparse(state):
            return self.inner.assign_site(state, site, rank, scale, seed)
        server = _server_values(self.name, state, site)
        checked_rank(self.name, site, rank, server.shape)
        checked_scale(self.name, site, scale)
        return SiteAssignment(_first(server, _entries(server.shape, rank)))

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with the values' increments averaged at this site; then as inner."""
        if not self._sparse(state):
            return self.inner.merge_site(state, site, contributions)
        server = _server_values(self.name, state, site)
        values, dtype = server.values.to(torch.float64, copy=True), server.values.dtype
        for place, contribution in weighed(self.name, site, contributions):
            start, result = _checked(place, server, contribution)
            change = result.values.double() - start.values.double()
            values[: len(change)] += contribution.weight * change
            dtype = torch.promote_types(dtype, result.values.dtype)
        new = Sparse(values.to(dtype), server.positions, server.shape)
        report = SiteReport(energy=new.norm() ** 2, discarded=0.0)
        return state.update(_tensors(site, new.values, new.positions)), report

    def conclude(self, state: State, clients: Sequence[str]) -> State:
        """Count a sparse round; after the last one, hand its factors to the inner rule."""
        if not self._sparse(state):
            return self.inner.conclude(state, clients)
        stage = _stage(state)
        done = cast("int", stage["round"]) + 1
        if done < self.rounds:
            return state.update({}, {_KEY: {**stage, "round": done}})  # type: ignore[dict-item]
        ranks = cast("Mapping[str, int]", stage["server_rank"])
        updates: dict[str, Factorisation] = {}
        for site, rank in ranks.items():
            updates[site] = factor_dense(_server_values(self.name, state, site).dense(), rank)
        others = {name: t for name, t in state.tensors.items() if not name.endswith(_SUFFIXES)}
        return self.inner.started(State(others, {**state.scalars, _KEY: {"round": done}}), updates)

    def adapter(self, state: State) -> Adapter[Delta]:
        """Return the sparse update at every site; then as the inner rule."""
        if not self._sparse(state):
            return self.inner.adapter(state)
        sites = cast("Mapping[str, object]", _stage(state)["shapes"])
        return Adapter({site: _server_values(self.name, state, site) for site in sites})

    def _sparse(self, state: State) -> bool:
        """Whether the first stage is not over."""
        return cast("int", _stage(state)["round"]) < self.rounds


_KEY = "slora"
_SUFFIXES = ("/sparse-values", "/sparse-positions")


def _entries(shape: tuple[int, int], rank: int) -> int:
    """How many entries a client of this rank trains: as many as its factors would have."""
    m, n = shape
    return min(m * n, rank * (m + n))


def _order(shape: tuple[int, int], seed: int, site: str) -> Tensor:
    """All flat positions of an m×n matrix in a random order."""
    draw = seeds.generator(seed, site, "sparse positions")
    return torch.randperm(shape[0] * shape[1], generator=draw)


def _tensors(site: str, values: Tensor, positions: Tensor) -> dict[str, Tensor]:
    return dict(zip((f"{site}{s}" for s in _SUFFIXES), (values, positions), strict=True))


def _stage(state: State) -> Mapping[str, object]:
    return cast("Mapping[str, object]", state.scalars[_KEY])


def _server_values(rule: str, state: State, site: str) -> Sparse:
    shapes = cast("Mapping[str, tuple[int, int]]", _stage(state)["shapes"])
    try:
        values, positions = (state.tensors[f"{site}{suffix}"] for suffix in _SUFFIXES)
        m, n = shapes[site]
    except KeyError:
        raise SiteError(f"{rule}: no site {site!r} in the state") from None
    return Sparse(values, positions, (m, n))


def _first(server: Sparse, count: int) -> Sparse:
    return Sparse(server.values[:count], server.positions[:count], server.shape)


def _checked(place: str, server: Sparse, contribution: Contribution) -> tuple[Sparse, Sparse]:
    """Return what was sent and what came back, or raise UpdateError."""
    start, result = contribution.sent.start, contribution.result
    if not isinstance(start, Sparse) or not isinstance(result, Sparse):
        raise UpdateError(
            f"{place}: expected a sparse update, sent was {type(start).__name__}, got "
            f"{type(result).__name__}"
        )
    expected = _first(server, len(start.values))
    for what, other in (("was sent", start), ("is returned", result)):
        if other.shape != server.shape or not torch.equal(other.positions, expected.positions):
            raise UpdateError(
                f"{place}: what {what} has {len(other.values)} values of a {other.shape} matrix at "
                f"other positions than the first {len(expected.values)} of the order"
            )
    checked_finite(place, result)
    return start, result
