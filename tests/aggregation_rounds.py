"""Rounds of a rule on one matrix with planted training, for tests of the server's mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from polyrank.aggregation import (
    Contribution,
    FleetSpec,
    Rule,
    SiteAssignment,
    SiteReport,
    State,
    fixed,
    normalised,
)
from polyrank.algebra import Delta, Dense, LowRank, Sparse

SITE = "block.0.q"


@dataclass(frozen=True)
class Client:
    """A client as a rule sees it: its rank, its scale s, its weight."""

    rank: int
    scale: float
    weight: float


Training = Callable[[int, SiteAssignment], Delta]


def fleet(ranks: Sequence[int], alpha: float = 16.0, weights: Sequence[float] | None = None):
    """Return clients with s = α/r and the given weights, equal by default."""
    shares = weights or [1 / len(ranks)] * len(ranks)
    return [Client(r, alpha / r, w) for r, w in zip(ranks, shares, strict=True)]


@st.composite
def fleets(draw, equal: bool = False):
    """Draw clients of mixed ranks, weights and scales (fixed α, α ∝ r, or rsLoRA's α/√r)."""
    count = draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    ranks = [ranks[0]] * count if equal else ranks
    weights = normalised(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
    alpha = draw(st.sampled_from([1.0, 4.0, 16.0]))
    scale = draw(
        st.sampled_from([lambda r: alpha / r, lambda r: alpha / math.sqrt(r), lambda _: alpha])
    )
    return [Client(r, scale(r), w) for r, w in zip(ranks, weights, strict=True)]


def fresh_state(rule: Rule, shape: tuple[int, int], clients, server_rank: int = 0) -> State:
    """Return the rule's state before round 0, at the largest rank unless told otherwise."""
    kept = server_rank or max(client.rank for client in clients)
    ranks = {str(i): {SITE: client.rank} for i, client in enumerate(clients)}
    return rule.init(FleetSpec({SITE: shape}, ranks, {SITE: kept}, seed=0))


def widened(state: State) -> State:
    """Return the state in float64."""
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in state.tensors.items()
    }
    return State(tensors, state.scalars)


def assigned_to(
    rule: Rule, state: State, client: str, rank: int, scale: float, seed: int
) -> SiteAssignment:
    """Return what a client gets: its own, where the rule keeps something for it."""
    if rule.personal(state, client):
        return rule.assign_own(state, client, SITE, rank, scale, seed)
    return rule.assign_site(state, SITE, rank, scale, seed)


def play(
    rule: Rule,
    state: State,
    clients,
    training: Training,
    seed: int = 0,
    names: Sequence[int] | None = None,
) -> tuple[State, SiteReport]:
    """Assign to all clients, train each, merge. They are called ``0``, ``1``, … or by `names`."""

    def contributions():
        for i, client in enumerate(clients):
            name = str(i if names is None else names[i])
            assigned = assigned_to(rule, state, name, client.rank, client.scale, seed)
            yield Contribution(client.weight, assigned, training(i, assigned), name)

    return rule.merge_site(state, SITE, contributions())


def play_round(
    rule: Rule, state: State, clients, training: Training, seed: int = 0
) -> tuple[State, SiteReport]:
    """Play a whole round, in the order in which a rule is asked: ranks, weights, merge, end.

    Clients are called ``0``, ``1``, …; their scale is α/r of the rank that they get.
    """
    assigned, results = {}, {}
    for i, client in enumerate(clients):
        rank = rule.ranks(state, str(i), {SITE: client.rank})[SITE]
        scale = client.scale * client.rank / rank
        assigned[str(i)] = assigned_to(rule, state, str(i), rank, scale, seed)
        results[str(i)] = training(i, assigned[str(i)])
    given = {str(i): client.weight for i, client in enumerate(clients)}
    weights = rule.weigh(state, given, lambda client: results[client].norm())
    contributions = (
        Contribution(weight, assigned[client], results[client], client)
        for client, weight in zip(weights, normalised(weights), strict=True)
    )
    state, report = rule.merge_site(state, SITE, contributions)
    return rule.conclude(state, [*weights]), report


def no_training(_: int, assigned: SiteAssignment) -> Delta:
    """Return a copy of what was sent."""
    return assigned.start.scale(1.0)


def noisy_training(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Training:
    """Return a training that adds noise of its own to all that a client is to train."""

    def training(i: int, assigned: SiteAssignment) -> Delta:
        draw = torch.Generator().manual_seed(1000 * seed + i)

        def noisy(tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(tensor.shape, generator=draw, dtype=dtype)
            return tensor.to(dtype) + size * noise

        if isinstance(assigned.start, Sparse):
            values = noisy(assigned.start.values)
            return Sparse(values, assigned.start.positions, assigned.start.shape)
        if isinstance(assigned.start, Dense):
            return Dense(noisy(assigned.start.matrix))
        still = fixed(assigned.start, assigned.train)
        factors = assigned.start.tensors().items()
        return LowRank(**{n: x.to(dtype) if n in still else noisy(x) for n, x in factors})

    return training


def product(rule: Rule, state: State) -> torch.Tensor:
    """Return the global ΔW, dense, in float64."""
    return rule.adapter(state)[SITE].to(dtype=torch.float64).dense()


def best(d: torch.Tensor, rank: int) -> torch.Tensor:
    """Return T_rank(D) by dense SVD in float64."""
    u, s, vh = torch.linalg.svd(d.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ‖one − other‖ / ‖other‖ (Frobenius)."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def padded(factors: LowRank, rank: int) -> LowRank:
    """Return the factors in float64, filled up with zeros to `rank`."""
    more = rank - factors.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(factors.b.double(), (0, more)), pad(factors.a.double(), (0, 0, 0, more)))
