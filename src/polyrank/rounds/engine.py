"""The interface of engines, which have the clients of a round trained, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from polyrank.aggregation import Update
from polyrank.planning import CutPoint
from polyrank.rounds.messages import Failure, TrainTask
from polyrank.training import Scoring

CutOf = Callable[[str], CutPoint | None]
"""Where a client's model is cut; None: it runs all of it."""


OnStep = Callable[[], None] | None
"""Called at every step forward; may raise to end the work."""


class Engine(Protocol):
    """Has tasks carried out, wherever the clients are.

    `cohort` is how many clients train in one pass, and `scoring` in which steps importance is
    measured.
    """

    cohort: int
    scoring: Scoring

    def cohorts(self, clients: Sequence[str], cut_of: CutOf) -> list[list[str]]:
        """Return the clients in groups; what depends on others of a group is done again whole."""
        ...

    def run(
        self, groups: Sequence[Sequence[TrainTask]], on_step: OnStep
    ) -> Iterator[Update | Failure]:
        """Yield the answers to the tasks of these groups as they come.

        Also those to tasks of before that come now.
        """
        ...

    def close(self) -> None:
        """Give up what the engine holds beside the model."""
        ...
