"""Train tasks, their answers, and a round's records of accepted and rejected updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyrank.aggregation import Assignment
from polyrank.planning import CutPoint

FailureKind = Literal["failed", "invalid", "late", "lost", "refused"]
"""Why a client has no update: its training `failed`, it was `late`, it was `lost` (nothing was
heard of it again), or it `refused` the plan by limits of its own."""

RejectionKind = Literal[FailureKind, "duplicate", "stale"]
"""Why an answer is not aggregated: there is no update, one was accepted already, it answers another
round or attempt, or it is not what was asked for."""

_LONGEST = 300


@dataclass(frozen=True)
class TrainTask:
    """What one client is asked to do in a round.

    `seed` is the root of its random choices; `cut` says where its model is cut, if it is.
    """

    client: str
    round: int
    attempt: int
    seed: int
    assignment: Assignment
    cut: CutPoint | None = None


@dataclass(frozen=True)
class Failure:
    """The answer that there will be no update, and why; the engine gives it for a silent client.

    `metrics` of a split client carry ``wire_up`` and ``wire_down`` like those of an update: bytes
    that travelled all the same.
    """

    client: str
    round: int
    attempt: int
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    kind: FailureKind = "failed"


@dataclass(frozen=True)
class AcceptedUpdate:
    """All of an accepted update but its factors.

    `clipped` is the share of its increment that counts: 1 unless it moved further than is allowed.
    """

    examples: int
    nbytes: int
    metrics: Mapping[str, float]
    importance: Mapping[str, float] = field(default_factory=dict)
    clipped: float = 1.0


@dataclass(frozen=True)
class RejectedUpdate:
    """An answer, or the lack of one, that is not aggregated."""

    client: str
    kind: RejectionKind
    reason: str

    @staticmethod
    def of(client: str, kind: RejectionKind, reason: str) -> RejectedUpdate:
        """Return it with a reason of at most 300 characters."""
        short = reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 1]}…"
        return RejectedUpdate(client, kind, short)
