"""Rounds of four clients, and updates for them, good and spoiled."""

from dataclasses import replace

import torch

from polyrank.aggregation import FleetSpec, FlexLoRA, Update
from polyrank.algebra import Adapter, LowRank
from polyrank.planning import CutPoint, Scaling
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round

SHAPES = {"q": (6, 5), "v": (4, 7)}
RANKS = {"a": {"q": 1, "v": 2}, "b": {"q": 3, "v": 2}, "c": {"q": 3, "v": 2}, "d": {"q": 2}}
NUMBERS = {"loss": 1.0, "tokens": 20.0, "target_tokens": 10.0}


def settings(rule=None, weights=None, **rest) -> RoundSettings:
    weights = weights or {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    return RoundSettings(rule or FlexLoRA(), RANKS, weights, Scaling(), seed=0, **rest)


def state(chosen: RoundSettings):
    """A state that is not zero, at rank 3 and 2."""
    spec = FleetSpec(SHAPES, RANKS, {"q": 3, "v": 2}, 0)
    begun = Round(chosen, chosen.rule.init(spec), 1, 0, list(RANKS))
    updates = {client: answer(begun, client) for client in RANKS}
    for update in updates.values():
        begun.accept(update)
    return begun.aggregate(lambda client, site: updates[client].adapter[site])[0]


def begin(chosen: RoundSettings | None = None, clients=("a", "b", "c", "d")) -> Round:
    chosen = chosen or settings()
    free = replace(chosen, max_increment=None, clip_increment=None, max_share=None, cut_of=None)
    before = state(free)
    return Round(chosen, before, 2, 0, list(clients))


def answer(round: Round, client: str, **changes) -> Update:
    """What a client would send that moved its factors a little."""
    draw = torch.Generator().manual_seed(sum(client.encode()))

    def moved(factor: torch.Tensor) -> torch.Tensor:
        return factor + 0.1 * torch.randn(factor.shape, generator=draw)

    assignment = round.assignment(client)
    adapter = Adapter({s: LowRank(moved(d.b), moved(d.a)) for s, d in assignment.start.items()})
    sent = Update(client, round.number, round.attempt, assignment.hash(), 9, adapter, NUMBERS)
    return replace(sent, **changes)


def with_site(update: Update, site: str, delta: LowRank) -> Adapter:
    return Adapter({**update.adapter, site: delta})


def spoiled(value: float, site: str = "q", factor: str = "a"):
    def spoil(update: Update) -> Update:
        delta = update.adapter[site]
        tensors = {"b": delta.b.clone(), "a": delta.a.clone()}
        tensors[factor][0, 0] = value
        return replace(update, adapter=with_site(update, site, LowRank(**tensors)))

    return spoil


def resized(site: str, m: int, n: int, rank: int):
    zeros = LowRank(torch.zeros(m, rank), torch.zeros(rank, n))
    return lambda update: replace(update, adapter=with_site(update, site, zeros))


def metric(name: str, value):
    return lambda update: replace(update, metrics={**NUMBERS, name: value})


def divided(rule=None, **rest) -> RoundSettings:
    """Client a holds q alone, b holds v alone, c and d are whole."""
    held = {CutPoint(1): frozenset({"q"}), CutPoint(2): frozenset({"v"})}
    cuts = {"a": CutPoint(1), "b": CutPoint(2)}
    return settings(rule, cut_of=lambda client, _: cuts.get(client), sites_by_cut=held, **rest)


WIRED = {**NUMBERS, "wire_up": 1000.0, "wire_down": 700.0}


def bytes_at(adapter, *sites: str) -> int:
    return sum(adapter[site].nbytes for site in sites)
