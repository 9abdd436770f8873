"""Rounds of a rule on one matrix with planted training, for tests of the server's mathematics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from polyrank.aggregation import Contribution, Dealt, FleetSpec, Rule, SiteReport, State
from polyrank.algebra import LowRank

SITE = "block.0.q"


@dataclass(frozen=True)
class Client:
    """A client as a rule sees it: its rank, its scale s, its weight."""

    rank: int
    scale: float
    weight: float


Training = Callable[[int, Dealt], LowRank]


def fleet(ranks: Sequence[int], alpha: float = 16.0, weights: Sequence[float] | None = None):
    """Return clients with s = α/r and the given weights, equal by default."""
    shares = weights or [1 / len(ranks)] * len(ranks)
    return [Client(r, alpha / r, w) for r, w in zip(ranks, shares, strict=True)]


def fresh_state(rule: Rule, shape: tuple[int, int], clients, server_rank: int = 0) -> State:
    """Return the rule's state before round 0, at the largest rank unless told otherwise."""
    kept = server_rank or max(client.rank for client in clients)
    ranks = {str(i): {SITE: client.rank} for i, client in enumerate(clients)}
    return rule.init(FleetSpec({SITE: shape}, ranks, {SITE: kept}, seed=0))


def widened(state: State) -> State:
    """Return the state in float64."""
    return State({name: tensor.double() for name, tensor in state.tensors.items()}, state.scalars)


def play(
    rule: Rule, state: State, clients, training: Training, seed: int = 0
) -> tuple[State, SiteReport]:
    """Deal to every client, train each, merge."""

    def contributions():
        for i, client in enumerate(clients):
            dealt = rule.deal_site(state, SITE, client.rank, client.scale, seed)
            yield Contribution(client.weight, dealt, training(i, dealt))

    return rule.merge_site(state, SITE, contributions())


def no_training(_: int, dealt: Dealt) -> LowRank:
    """Return copies of what was dealt."""
    return LowRank(dealt.start.b.clone(), dealt.start.a.clone())


def noisy_training(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Training:
    """Return a training that adds noise of its own to each client's factors."""

    def training(i: int, dealt: Dealt) -> LowRank:
        draw = torch.Generator().manual_seed(1000 * seed + i)
        b, a = (
            f.to(dtype) + size * torch.randn(f.shape, generator=draw, dtype=dtype)
            for f in (dealt.start.b, dealt.start.a)
        )
        return LowRank(b, a)

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
