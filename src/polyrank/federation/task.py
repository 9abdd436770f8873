"""What is asked of a client in a round."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.aggregation import Assignment
from polyrank.planning import Split


@dataclass(frozen=True)
class Task:
    """What one client is asked to do in a round.

    `seed` is the root of its random choices; `cut` says where its model is cut, if it is.
    """

    client: str
    round: int
    attempt: int
    seed: int
    assignment: Assignment
    cut: Split | None = None
