"""Packets to try: of real rounds of every rule, and of all kinds, with ways to spoil them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aggregation_rounds import noisy_training
from polyrank.aggregation import FleetSpec, Penalty, Rule, SiteAssignment, Update
from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.planning import CutPoint, DeviceProfile
from polyrank.planning.scaling import Scaling
from polyrank.protocol.client_info import ClientInfo, ClientPolicy, Counts, NodeInfo
from polyrank.protocol.evaluate import EvaluateRequest
from polyrank.protocol.train_request import TrainRequest
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.messages import TrainTask
from polyrank.rounds.round import Round

SHAPES = {"block.0.q": (6, 5), "block.0.down": (4, 7), "block.1.q": (6, 5)}
RANKS = {
    "c0": {"block.0.q": 1, "block.0.down": 2, "block.1.q": 1},
    "c1": {"block.0.q": 3, "block.0.down": 3, "block.1.q": 3},
}
HASH = "0123456789abcdef" * 4


def assignments(rule: Rule, equal: bool = False) -> Iterator[tuple[Round, str]]:
    """Yield every client of three rounds, between which all were trained with noise."""
    ranks = {"c0": RANKS["c1"], "c1": RANKS["c1"]} if equal else RANKS
    settings = RoundSettings(rule, ranks, {"c0": 1.0, "c1": 2.0}, Scaling("fixed", 3.7), seed=5)
    largest = dict.fromkeys(SHAPES, 3)
    state = rule.init(FleetSpec(SHAPES, ranks, largest, seed=5))
    for number in (1, 2, 3):
        round = Round(settings, state, number, 0, ["c0", "c1"])
        yield from ((round, client) for client in round.clients)
        answers = {client: trained(round, client) for client in round.clients}
        for update in answers.values():
            round.accept(update)
        state, _ = round.aggregate(lambda client, site, of=answers: of[client].adapter[site])


def trained(round: Round, client: str) -> Update:
    """Return an acceptable update of a client, from noise."""
    assignment = round.assignment(client)
    return update_to(assignment, client, round.number, round.assignment_hash(client))


def update_to(assignment: Assignment, client: str = "c0", number: int = 1, whole: str = HASH):
    """Return an update that adds noise to all that is to be trained."""
    training = noisy_training(number, dtype=torch.float32)
    adapter = {
        site: training(i, SiteAssignment(start, train=assignment.train))
        for i, (site, start) in enumerate(assignment.start.items())
    }
    metrics = {"loss": 0.1 + 0.2, "tokens": 12, "target_tokens": 7, "wire_up": 0.0}
    return Update(client, number, 0, whole, 5, Adapter(adapter), metrics, {"block.0.q": 1e-300})


def low_rank(m: int, n: int, rank: int, dtype=torch.float32, seed: int = 0) -> LowRank:
    """Return random factors."""
    draw = torch.Generator().manual_seed(seed)
    b, a = torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw)
    return LowRank(b.to(dtype), a.to(dtype))


def assignment() -> Assignment:
    """Return an assignment with every kind of term."""
    start = {
        "block.0.q": low_rank(6, 5, 2),
        "block.0.k": low_rank(6, 5, 2, torch.bfloat16),
        "block.0.v": low_rank(3, 4, 0),
        "block.1.q": Sparse(torch.randn(3), torch.tensor([29, 0, 7]), (6, 5)),
        "block.1.k": Dense(torch.randn(2, 3, dtype=torch.float64)),
    }
    first = start["block.0.q"]
    frozen = {
        "block.0.q": LowRank(-first.b, first.a),
        "block.0.k": low_rank(6, 5, 3, torch.bfloat16, 1),
    }
    return Assignment(
        Adapter(start),
        {site: 0.1 * (i + 1) for i, site in enumerate(start)},
        Adapter(frozen),
        Adapter({"block.0.q": Dense(torch.randn(6, 5))}),
        penalty=Penalty(1e-3, {"block.0.q": 1, "block.0.k": 2}),
    )


def train_request(cut: CutPoint | None = None) -> TrainRequest:
    """Return a request with all kinds of terms."""
    sent = assignment()
    task = TrainTask("c0", 3, 1, 2**62 + 1, sent, cut)
    return TrainRequest(task, sent.hash() if cut is None else HASH, 4, "channel", 12.5)


def node_info() -> NodeInfo:
    """Return a node with two clients."""
    counts = {"train": Counts(5, 40, 12), "validation": Counts(2, 9, 3), "test": Counts(0, 0, 0)}
    return NodeInfo(
        (ClientInfo("c0", "a", True, counts, HASH), ClientInfo("ü 1", "", False, counts, "")),
        DeviceProfile("board", 2**33, 1e12, None, 1.5e6, 0.01),
        ClientPolicy(8, 2, False, 10),
        {"polyrank": "0.1", "torch": "2.13.0"},
    )


def evaluate_request() -> EvaluateRequest:
    """Return queries about two adapters and the bare base."""
    one, other = Adapter(dict(assignment().start)), Adapter({"block.0.q": low_rank(6, 5, 1)})
    return EvaluateRequest(
        (
            EvaluateQuery(one, ("c0", "c1"), "validation", True),
            EvaluateQuery(None, ("c1",), "test", False),
            EvaluateQuery(other, (), "train", False),
            EvaluateQuery(one, ("c0",), "validation", False),
        )
    )


def client_metrics() -> list[ClientMetrics]:
    """Return the answers to `evaluate_request`."""
    full = {"loss": 0.1 + 0.2, "exact_match": 0.5, "rouge_l": 1.0}
    bare = {"loss": 2.5, "exact_match": None, "rouge_l": None}
    return [
        ClientMetrics({"c0": full, "c1": bare}, 3),
        ClientMetrics({"c1": bare}),
        ClientMetrics({}),
        ClientMetrics({"c0": {**bare, "loss": None}}),
    ]


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return header, fields and tensor bytes of a packet."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["fields"]), data[8 + length :]


def closed(header: dict[str, Any], fields: object, rest: bytes) -> bytes:
    """Return the packet again; `fields` None leaves those of the header."""
    if fields is not None:
        written = fields if isinstance(fields, str) else json.dumps(fields)
        about = {**header["__metadata__"], "fields": written}
        header = {**header, "__metadata__": about}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def with_fields(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a packet whose fields were changed in place, or replaced by what `change` returns."""
    header, fields, rest = opened(data)
    changed = change(fields)
    return closed(header, fields if changed is None else changed, rest)


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a packet whose header was changed in place."""
    header, _, rest = opened(data)
    change(header)
    return closed(header, None, rest)
