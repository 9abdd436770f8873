"""Records of a round as small as they can be: four clients in two attempts."""

from dataclasses import replace
from typing import ClassVar

from polyrank.aggregation import SiteReport
from polyrank.rounds.messages import AcceptedUpdate, RejectedUpdate
from polyrank.run import RoundRecord

KINDS = {"b": "late"}
CLIPPED = {"a": 0.25, "b": 1.0}
SECONDS = {"train": 1.0, "merge": 0.5, "evaluate": 0.5, "total": 2.0}


class Attempt:
    """As much of a round as a record asks for."""

    number, bytes_down, bytes_up = 4, 100, 60
    wire_down, wire_up = 30, 20
    cuts: ClassVar = {"2": 1, "whole": 2}

    def __init__(self, attempt, accepted, rejected):
        self.attempt, self.rejected = attempt, rejected
        self.clients = sorted([*accepted, *rejected])
        self.rejections = [
            RejectedUpdate(c, KINDS.get(c, "invalid"), rejected[c]) for c in rejected
        ]
        each = {client: {"up": 0, "down": 0} for client in self.clients}
        self.traffic = {**each, "a": {"up": 60, "down": 100}}
        self.accepted = {
            client: AcceptedUpdate(
                1, 0, {"loss": loss, "tokens": 10.0, "target_tokens": targets}, {}, CLIPPED[client]
            )
            for client, (loss, targets) in accepted.items()
        }


def record(last_losses=None, **changes) -> RoundRecord:
    attempts = [
        Attempt(0, {"a": (9.0, 1.0)}, {"c": "NaN", "b": "late"}),
        Attempt(1, {"b": (1.0, 30.0), "a": (3.0, 10.0)}, {"d": "rank 1"}),
    ]
    types = {"a": "T1", "b": "T2", "c": "T1", "d": "T1"}
    reports = {"v": SiteReport(3.0, 1.0), "q": SiteReport(5.0, 1.0)}
    made = RoundRecord.of(attempts, types, reports, None, SECONDS, last_losses=last_losses)
    return replace(made, **changes)
