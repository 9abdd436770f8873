"""The answer to a train request: an update, or a failure with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyrank.aggregation import Assignment, Update
from polyrank.protocol import json_fields as reading
from polyrank.protocol.adapters import read_adapter, read_trained, write_adapter, write_trained
from polyrank.protocol.json_fields import Fields
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import SizeLimits
from polyrank.rounds.messages import Failure, FailureKind

REASON_BYTES = 4096
"""The longest reason of a failure, in UTF-8; a longer one is cut."""
_KINDS: dict[str, FailureKind] = {"failed": "failed", "late": "late", "refused": "refused"}
"""Kinds of failure that a client reports; the server finds the others."""
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def write_train_result(result: Update | Failure, sent: Assignment | None = None) -> bytes:
    """Return the packet of a result.

    With `sent`, the assignment as this client got it, only what was trained travels:
    ``sent.travelling(update.adapter)`` bytes of tensors. The reader must be given it too.
    Raises PacketError if the update changed anything else, or cannot be written.
    """
    about: dict[str, Any] = {
        "client": result.client,
        "round": result.round,
        "attempt": result.attempt,
        "metrics": _numbers(result.metrics),
    }
    if isinstance(result, Failure):
        why = {"reason": shortened(result.reason), "kind": result.kind}
        return pack("answer", {**about, **why}, {})
    if sent is None:
        tensors = write_adapter("trained", result.adapter)
    else:
        tensors = write_trained("trained", result.adapter, sent, "train result packet")
    fields = {
        **about,
        "reason": None,
        "assignment": result.assignment,
        "examples": result.examples,
        "importance": _numbers(result.importance),
    }
    return pack("answer", fields, tensors)


def shortened(reason: str) -> str:
    """Return a reason of at most `REASON_BYTES` bytes in UTF-8."""
    return reason.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore")


def read_train_result(
    data: bytes | bytearray | memoryview, limits: SizeLimits, sent: Assignment | None = None
) -> Update | Failure:
    """Return the result of a packet; `limits` are `SizeLimits.of` the assignment that was sent.

    With `sent`, what did not travel is put back from it, and sites, kinds and shapes are its own.
    Whether the result is the awaited one, and its numbers are finite, is left to `Round.accept`.
    Raises PacketError for everything that `write_train_result` did not write.
    """
    packet = Packet(data, "answer", limits)
    fields = packet.fields
    client, round = fields.text("client"), fields.whole("round")
    attempt, metrics = fields.whole("attempt"), _read_numbers(fields.table("metrics"))
    result: Update | Failure
    if not fields.gone("reason"):
        reason = reading.displayable(fields.text("reason", REASON_BYTES, 0))
        kind = fields.choice("kind", _KINDS)
        result = Failure(client, round, attempt, reason, metrics, _KINDS[kind])
    else:
        result = Update(
            client=client,
            round=round,
            attempt=attempt,
            assignment=fields.hash("assignment"),
            examples=fields.whole("examples"),
            adapter=read_adapter(packet, "trained")
            if sent is None
            else read_trained(packet, "trained", sent),
            metrics=metrics,
            importance=_read_numbers(fields.table("importance")),
        )
    packet.close()
    return result


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Return numbers as JSON has them; those that are not finite by name: the reader judges."""
    return {
        name: value if math.isfinite(value) else str(float(value)) for name, value in values.items()
    }


def _read_numbers(table: Fields) -> dict[str, float]:
    return {
        name: _ODD[value]
        if isinstance(value, str) and value in _ODD
        else reading.number(value, place)
        for name, value, place in table.named()
    }
