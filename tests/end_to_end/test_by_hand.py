"""A whole run of the library's rule against the same run written out by hand, in float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from polyrank.aggregation import Contribution, FleetSpec, FlexLoRA, State, normalised
from polyrank.aggregation.client_factors import initial_rows
from polyrank.algebra import LowRank

EXAMPLE = Path(__file__).parents[2] / "examples" / "flexlora_by_hand.py"
ROUNDS = 5


@pytest.fixture(scope="module")
def hand():
    spec = importlib.util.spec_from_file_location("flexlora_by_hand", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def library_run(hand, base, clients, rule, **training):
    """Yield (D per site, mean loss) per round: polyrank's server, the example's training."""
    weights = normalised([len(client.x) for client in clients])
    ranks = {str(i): dict.fromkeys(hand.SHAPES, c.rank) for i, c in enumerate(clients)}
    server = dict.fromkeys(hand.SHAPES, max(client.rank for client in clients))
    state = rule.init(FleetSpec(hand.SHAPES, ranks, server, seed=0))
    state = State({name: tensor.double() for name, tensor in state.tensors.items()})
    for t in range(ROUNDS):
        parts = {site: [] for site in hand.SHAPES}
        for w, client in zip(weights, clients, strict=True):
            assigned = {
                s: rule.assign_site(state, s, client.rank, client.s, t) for s in hand.SHAPES
            }
            factors = {s: (d.start.b / client.s, d.start.a) for s, d in assigned.items()}
            frozen = {
                s: torch.zeros(shape, dtype=torch.float64)
                if assigned[s].frozen is None
                else assigned[s].frozen.dense()
                for s, shape in hand.SHAPES.items()
            }
            trained = hand.train(base, frozen, factors, client, **training)
            for s, (b, a) in trained.items():
                parts[s].append(Contribution(w, assigned[s], LowRank(b * client.s, a)))
        for s, contributions in parts.items():
            state, _ = rule.merge_site(state, s, iter(contributions))
        d = {s: delta.dense() for s, delta in rule.adapter(state).items()}
        losses = [hand.loss(base, d, client.x, client.y) for client in clients]
        yield d, float(sum(w * one for w, one in zip(weights, losses, strict=True)))


@pytest.mark.parametrize("mode", ["replace", "delta", "tail-in-base"])
@pytest.mark.parametrize("factorisation", ["auto", "qr", "dense"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_library_and_hand_agree_round_by_round(hand, mode, factorisation, optimizer):
    base, clients = hand.problem()

    def fresh(site, rank, n, seed):
        return initial_rows(n, rank, seed=seed, site=site)

    by_hand = hand.flexlora(base, clients, mode, ROUNDS, fresh=fresh, optimizer=optimizer)
    rule = FlexLoRA(mode, factorisation=factorisation)
    by_library = library_run(hand, base, clients, rule, optimizer=optimizer)
    losses = []
    for (d, loss), (ours, our_loss) in zip(by_hand, by_library, strict=True):
        for site in hand.SHAPES:
            torch.testing.assert_close(ours[site], d[site], rtol=0, atol=1e-9)
        assert our_loss == pytest.approx(loss, abs=1e-9)
        losses.append(loss)
    assert len(losses) == ROUNDS
    assert losses[-1] < losses[0], "the run must learn for the comparison to say something"


def test_the_modes_differ_in_the_run_by_hand(hand):
    base, clients = hand.problem()
    ends = []
    for mode in ("replace", "delta", "tail-in-base"):
        *_, (_, loss) = hand.flexlora(base, clients, mode, ROUNDS)
        ends.append(loss)
    assert len({round(loss, 4) for loss in ends}) == 3
