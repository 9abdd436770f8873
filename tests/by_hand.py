"""Split clients driven by hand: what they send is random, and made before anything is answered."""

from dataclasses import replace

import torch

from jobs import job
from models import VOCABULARY, tiny_loaded
from polyrank.aggregation.types import Penalty
from polyrank.algebra import Adapter, distance
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint
from polyrank.training import LocalTraining
from polyrank.training.split import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    RequestId,
    Returned,
    ServerPartJob,
    ServerParts,
    Step,
)

STRAIGHT, BENT = CutPoint(1), CutPoint(1, 2)
LOCAL = LocalTraining(
    accumulation=2,
    epochs=None,
    steps=2,
    lr=1e-2,
    weight_decay=0.1,
    proximal=0.3,
    schedule="linear",
    dropout=0.2,
)
MICROBATCHES = 2
ROUND = 3


def model_of_three(architecture: str = "llama", **options: object) -> LoadedModel:
    """Return a model of three blocks in float64."""
    return tiny_loaded(architecture, num_hidden_layers=3, dtype=torch.float64, **options)


def server_job(
    model: LoadedModel,
    client: str,
    cut: CutPoint = STRAIGHT,
    *,
    rank: int = 2,
    seed: int = 0,
    local: LocalTraining = LOCAL,
    frozen: int = 0,
) -> ServerPartJob:
    """Return what the server trains for a client."""
    server = cut.at_server(model.spec.blocks)
    sites = frozenset(site.name for site in model.spec.sites if site.block in server)
    whole = job(model, client, ranks=rank, seed=seed, frozen=frozen, local=local).assignment
    penalised = replace(whole, penalty=Penalty(0.3, dict.fromkeys(whole.start, 1)))
    steps = local.steps or 0
    return ServerPartJob(client, ROUND, 0, cut, penalised.only(sites), local, seed, steps)


def requests_of(model: LoadedModel, one: ServerPartJob) -> list[Request]:
    """Return all that a client sends in a round: per step microbatches, then the step.

    In a U-shape two microbatches go out before the first comes back.
    """
    draw = torch.Generator().manual_seed(one.seed + 77)
    found: list[Request] = []
    for step in range(one.steps):
        out, back = [], []
        weight = 1.0 / (3 + step)
        for micro in range(MICROBATCHES):
            at = RequestId(one.client, one.round, one.attempt, step, micro)
            lengths = (4, 2, 3)[: 2 + (one.seed + micro) % 2]
            tokens, last = sum(lengths), micro + 1 == MICROBATCHES
            states = torch.randn(tokens, model.spec.hidden, generator=draw, dtype=torch.float64)
            labels = torch.randint(0, VOCABULARY, (tokens,), generator=draw)
            labels[::2] = -100
            bent = one.cut.upper is not None
            out.append(Activations(at, last, weight, lengths, states, None if bent else labels))
            if bent:
                back.append(Gradients(at, last, states.flip(0) / 10))
        at = RequestId(one.client, one.round, one.attempt, step)
        found += [*out, *back, Step(at, 1.0 / (1 + step))]
    return found


def alone(model: LoadedModel, one: ServerPartJob) -> Adapter:
    """Return the adapter of a client that is served alone and makes no mistake."""
    with ServerParts(model, [one]) as server_parts:
        for request in requests_of(model, one):
            served(server_parts, request)
        return server_parts.adapter(one.client)


def served(server_parts: ServerParts, *requests: Request) -> list[Reply]:
    """Return the answers to requests of which none is refused."""
    replies = list(server_parts.answer(requests))
    for reply in replies:
        assert not isinstance(reply, Refused), reply.reason
    return replies


def refusal(reply: Reply) -> str:
    """Return the reason of a refusal."""
    assert isinstance(reply, Refused)
    return reply.reason


def assert_equal(one: Adapter, other: Adapter, tolerance: float = 1e-12) -> None:
    """Hold two adapters to be the same, to the bit (0) or up to rounding in float64."""
    assert one.keys() == other.keys()
    if tolerance == 0:
        assert one.hash() == other.hash()
        return
    for site, delta in one.items():
        assert distance(delta, other[site]) <= tolerance * max(1.0, delta.norm()), site


def assert_same_reply(one: Reply, other: Reply, tolerance: float = 0.0) -> None:
    """Hold two replies to say the same, to the bit or within a tolerance."""
    assert type(one) is type(other)
    assert one.id == other.id
    if isinstance(one, Returned) and isinstance(other, Returned):
        torch.testing.assert_close(one.states, other.states, rtol=tolerance, atol=tolerance)
        for mine, its in ((one.loss, other.loss), (one.squared_norm, other.squared_norm)):
            assert (mine is None) == (its is None)
            if mine is not None and its is not None:
                assert abs(mine - its) <= tolerance * abs(its)
