"""What clients are asked to score, and what they scored."""

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
from polyrank.protocol.size_limits import EXAMS, MARKS, SizeLimits
from polyrank.training.client_data import Part

SCORES = ("loss", "exact_match", "rouge_l")


@dataclass(frozen=True)
class EvaluateRequest:
    """Questions to the clients of one node."""

    questions: tuple[EvaluateQuery, ...]


def write_exam(exam: EvaluateRequest) -> bytes:
    """Return the packet of an exam; an adapter object that is asked about twice travels once."""
    numbers: dict[int, int] = {}
    adapters: list[Adapter] = []
    asked = []
    for one in exam.questions:
        if one.adapter is not None and id(one.adapter) not in numbers:
            numbers[id(one.adapter)] = len(adapters)
            adapters.append(one.adapter)
        asked.append(
            {
                "adapter": None if one.adapter is None else numbers[id(one.adapter)],
                "clients": list(one.clients),
                "part": one.part,
                "texts": one.texts,
            }
        )
    tensors: dict[str, Tensor] = {}
    for number, adapter in enumerate(adapters):
        tensors |= write_adapter(f"adapter {number}", adapter)
    return pack("exam", {"questions": asked, "adapters": len(adapters)}, tensors)


def read_exam(data: bytes | bytearray | memoryview, bounds: SizeLimits = EXAMS) -> EvaluateRequest:
    """Return the exam of a packet; PacketError for everything that `write_exam` did not write."""
    packet = Packet(data, "exam", bounds)
    fields = packet.fields
    items, at = fields.items("questions"), fields.at("questions")
    count = fields.whole("adapters", 0, len(items))
    adapters = [read_adapter(packet, f"adapter {number}") for number in range(count)]
    questions = [
        _question(Fields(one, f"{at}, number {number}"), adapters)
        for number, one in enumerate(items)
    ]
    packet.close()
    return EvaluateRequest(tuple(questions))


def _question(fields: Fields, adapters: Sequence[Adapter]) -> EvaluateQuery:
    adapter = (
        None if fields.gone("adapter") else adapters[fields.whole("adapter", 0, len(adapters) - 1)]
    )
    clients = tuple(reading.text(one, fields.at("clients")) for one in fields.items("clients"))
    if len(set(clients)) < len(clients):
        raise refusal(fields.at("clients"), "each client once", "one that is there twice")
    part = cast("Part", fields.choice("part", PARTS))
    question = EvaluateQuery(adapter, clients, part, fields.flag("texts"))
    fields.close()
    return question


def write_marks(marks: Sequence[ClientMetrics]) -> bytes:
    """Return the packet of the marks of an exam's questions; scores that are not finite are null.

    Raises PacketError for a score that no client is asked for.
    """
    written = [
        {
            "clients": {client: _written(client, scores) for client, scores in one.clients.items()},
            "no_room": one.no_room,
        }
        for one in marks
    ]
    return pack("marks", {"questions": written}, {})


def _written(client: str, scores: Mapping[str, float | None]) -> list[float | None]:
    if scores.keys() != set(SCORES):
        raise refusal(f"marks packet, client {client!r}", f"{[*SCORES]}", [*scores])
    values = (scores[name] for name in SCORES)
    return [value if value is not None and math.isfinite(value) else None for value in values]


def read_marks(
    data: bytes | bytearray | memoryview,
    exam: EvaluateRequest | None = None,
    bounds: SizeLimits = MARKS,
) -> tuple[ClientMetrics, ...]:
    """Return the marks of a packet, one per question.

    With `exam` there must be as many as it has questions, and of no client but those it asks.
    Raises PacketError for everything that `write_marks` did not write.
    """
    packet = Packet(data, "marks", bounds)
    fields = packet.fields
    items, at = fields.items("questions"), fields.at("questions")
    if exam is not None and len(items) != len(exam.questions):
        raise refusal(at, f"{len(exam.questions)}, as were asked", len(items))
    found = []
    for number, one in enumerate(items):
        clients = None if exam is None else exam.questions[number].clients
        found.append(_marks(Fields(one, f"{at}, number {number}"), clients))
    packet.close()
    return tuple(found)


def _marks(fields: Fields, clients: Sequence[str] | None) -> ClientMetrics:
    asked = None if clients is None else set(clients)
    scores = {}
    for client, values, place in fields.table("clients").named():
        if asked is not None and client not in asked:
            raise refusal(place, "a client that was asked", "another")
        scores[client] = _scores(values, place)
    marks = ClientMetrics(scores, fields.whole("no_room"))
    fields.close()
    return marks


def _scores(values: object, place: str) -> dict[str, float | None]:
    listed = reading.listed(values, place)
    if len(listed) != len(SCORES):
        raise refusal(place, f"{len(SCORES)} scores", len(listed))
    bounds = {"loss": (-math.inf, math.inf), "exact_match": (0.0, 1.0), "rouge_l": (0.0, 1.0)}
    return {
        name: None if value is None else reading.number(value, f"{place}, {name}", *bounds[name])
        for name, value in zip(SCORES, listed, strict=True)
    }
