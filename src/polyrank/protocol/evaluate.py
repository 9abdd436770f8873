"""The message that asks clients for scores, and its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from polyrank.algebra import Adapter
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.protocol import json_fields as reading
from polyrank.protocol.adapters import read_adapter, write_adapter
from polyrank.protocol.client_info import PARTS
from polyrank.protocol.json_fields import Fields, refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import WITH_TENSORS, WITHOUT_TENSORS, SizeLimits
from polyrank.training.client_data import Part

SCORES = ("loss", "exact_match", "rouge_l")


@dataclass(frozen=True)
class EvaluateRequest:
    """Queries to the clients of one node."""

    queries: tuple[EvaluateQuery, ...]


def write_evaluate_request(request: EvaluateRequest) -> bytes:
    """Return the packet of a request; an adapter object that several queries have travels once."""
    numbers: dict[int, int] = {}
    adapters: list[Adapter] = []
    written = []
    for query in request.queries:
        if query.adapter is not None and id(query.adapter) not in numbers:
            numbers[id(query.adapter)] = len(adapters)
            adapters.append(query.adapter)
        written.append(
            {
                "adapter": None if query.adapter is None else numbers[id(query.adapter)],
                "clients": list(query.clients),
                "part": query.part,
                "texts": query.texts,
            }
        )
    tensors: dict[str, Tensor] = {}
    for number, adapter in enumerate(adapters):
        tensors |= write_adapter(f"adapter {number}", adapter)
    return pack("exam", {"questions": written, "adapters": len(adapters)}, tensors)


def read_evaluate_request(
    data: bytes | bytearray | memoryview, limits: SizeLimits = WITH_TENSORS
) -> EvaluateRequest:
    """Return the request of a packet.

    Raises PacketError for everything that `write_evaluate_request` did not write.
    """
    packet = Packet(data, "exam", limits)
    fields = packet.fields
    items, at = fields.items("questions"), fields.at("questions")
    count = fields.whole("adapters", 0, len(items))
    adapters = [read_adapter(packet, f"adapter {number}") for number in range(count)]
    queries = [
        _query(Fields(item, f"{at}, number {number}"), adapters)
        for number, item in enumerate(items)
    ]
    packet.close()
    return EvaluateRequest(tuple(queries))


def _query(fields: Fields, adapters: Sequence[Adapter]) -> EvaluateQuery:
    adapter = (
        None if fields.gone("adapter") else adapters[fields.whole("adapter", 0, len(adapters) - 1)]
    )
    clients = tuple(reading.text(item, fields.at("clients")) for item in fields.items("clients"))
    if len(set(clients)) < len(clients):
        raise refusal(fields.at("clients"), "each client once", "one that is there twice")
    part = cast("Part", fields.choice("part", PARTS))
    query = EvaluateQuery(adapter, clients, part, fields.flag("texts"))
    fields.close()
    return query


def write_client_metrics(answers: Sequence[ClientMetrics]) -> bytes:
    """Return the packet of the answers to a request's queries; not finite scores become null.

    Raises PacketError for a score that no client is asked for.
    """
    written = [
        {
            "clients": {
                client: _written(client, scores) for client, scores in metrics.clients.items()
            },
            "no_room": metrics.no_room,
        }
        for metrics in answers
    ]
    return pack("marks", {"questions": written}, {})


def _written(client: str, scores: Mapping[str, float | None]) -> list[float | None]:
    if scores.keys() != set(SCORES):
        raise refusal(f"client metrics packet, client {client!r}", f"{[*SCORES]}", [*scores])
    values = (scores[name] for name in SCORES)
    return [value if value is not None and math.isfinite(value) else None for value in values]


def read_client_metrics(
    data: bytes | bytearray | memoryview,
    request: EvaluateRequest | None = None,
    limits: SizeLimits = WITHOUT_TENSORS,
) -> tuple[ClientMetrics, ...]:
    """Return the answers of a packet, one per query.

    With `request` there must be as many as it has queries, and of no client but those it asks.
    Raises PacketError for everything that `write_client_metrics` did not write.
    """
    packet = Packet(data, "marks", limits)
    fields = packet.fields
    items, at = fields.items("questions"), fields.at("questions")
    if request is not None and len(items) != len(request.queries):
        raise refusal(at, f"{len(request.queries)}, as were asked", len(items))
    answers = []
    for number, item in enumerate(items):
        clients = None if request is None else request.queries[number].clients
        answers.append(_metrics(Fields(item, f"{at}, number {number}"), clients))
    packet.close()
    return tuple(answers)


def _metrics(fields: Fields, clients: Sequence[str] | None) -> ClientMetrics:
    asked = None if clients is None else set(clients)
    scores = {}
    for client, values, place in fields.table("clients").named():
        if asked is not None and client not in asked:
            raise refusal(place, "a client that was asked", "another")
        scores[client] = _scores(values, place)
    metrics = ClientMetrics(scores, fields.whole("no_room"))
    fields.close()
    return metrics


def _scores(values: object, place: str) -> dict[str, float | None]:
    listed = reading.listed(values, place)
    if len(listed) != len(SCORES):
        raise refusal(place, f"{len(SCORES)} scores", len(listed))
    ranges = {"loss": (-math.inf, math.inf), "exact_match": (0.0, 1.0), "rouge_l": (0.0, 1.0)}
    return {
        name: None if value is None else reading.number(value, f"{place}, {name}", *ranges[name])
        for name, value in zip(SCORES, listed, strict=True)
    }
