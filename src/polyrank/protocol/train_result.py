"""What a client answers an order with: an update, or why there is none."""

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
"""What a client can say of itself; the other kinds are the server's to find."""
_ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def write_answer(answer: Update | Failure, dealt: Assignment | None = None) -> bytes:
    """Return the packet of an answer.

    With `dealt`, the assignment as this client got it, only what was trained travels:
    ``dealt.travelling(update.adapter)`` bytes of tensors. The reader must be given it too.
    Raises PacketError if the update changed anything else, or cannot be written.
    """
    about: dict[str, Any] = {
        "client": answer.client,
        "round": answer.round,
        "attempt": answer.attempt,
        "metrics": _numbers(answer.metrics),
    }
    if isinstance(answer, Failure):
        written = answer.reason.encode("utf-8", "replace")[:REASON_BYTES]
        why = {"reason": written.decode("utf-8", "ignore"), "kind": answer.kind}
        return pack("answer", {**about, **why}, {})
    if dealt is None:
        tensors = write_adapter("trained", answer.adapter)
    else:
        tensors = write_trained("trained", answer.adapter, dealt, "answer packet")
    fields = {
        **about,
        "reason": None,
        "assignment": answer.assignment,
        "examples": answer.examples,
        "importance": _numbers(answer.importance),
    }
    return pack("answer", fields, tensors)


def read_answer(
    data: bytes | bytearray | memoryview, bounds: SizeLimits, dealt: Assignment | None = None
) -> Update | Failure:
    """Return the answer of a packet; `bounds` are `SizeLimits.of` what was dealt.

    With `dealt`, what did not travel is put back from it, and sites, kinds and shapes are those
    that were dealt. Whether the answer is the one awaited, and its numbers are finite, is left to
    `Round.accept`. Raises PacketError for everything that `write_answer` did not write.
    """
    packet = Packet(data, "answer", bounds)
    fields = packet.fields
    client, round = fields.text("client"), fields.whole("round")
    attempt, metrics = fields.whole("attempt"), _read_numbers(fields.table("metrics"))
    answer: Update | Failure
    if not fields.gone("reason"):
        reason = reading.told(fields.text("reason", REASON_BYTES, 0))
        kind = fields.choice("kind", _KINDS)
        answer = Failure(client, round, attempt, reason, metrics, _KINDS[kind])
    else:
        answer = Update(
            client=client,
            round=round,
            attempt=attempt,
            assignment=fields.hash("assignment"),
            examples=fields.whole("examples"),
            adapter=read_adapter(packet, "trained")
            if dealt is None
            else read_trained(packet, "trained", dealt),
            metrics=metrics,
            importance=_read_numbers(fields.table("importance")),
        )
    packet.close()
    return answer


def _numbers(found: Mapping[str, float]) -> dict[str, float | str]:
    """Return numbers as JSON has them; those that are not finite by name, to be judged there."""
    return {
        name: value if math.isfinite(value) else str(float(value)) for name, value in found.items()
    }


def _read_numbers(table: Fields) -> dict[str, float]:
    return {
        name: _ODD[value]
        if isinstance(value, str) and value in _ODD
        else reading.number(value, place)
        for name, value, place in table.named()
    }
