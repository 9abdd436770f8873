"""Importance scores during a client's training: the steps that measure them, and their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyrank.errors import RecipeError
from polyrank.planning.importance import METRICS


@dataclass(frozen=True)
class Scoring:
    """Which optimizer steps of a round are scored, and by which metric.

    Steps count from 0 in each round; every `every`-th is scored, so the first always, and with 0
    none is. `metric` is ``channel`` or ``paper``: see `polyrank.planning.importance.METRICS`.

    Raises RecipeError for another metric, or `every` below 0.
    """

    every: int = 0
    metric: str = "channel"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise RecipeError(
                f"importance: expected a metric of {list(METRICS)}, got {self.metric!r}"
            )
        if self.every < 0:
            raise RecipeError(
                f"importance: expected to score every n-th step, n of 1 or more, or 0 for never; "
                f"got {self.every}"
            )

    def at(self, step: int) -> bool:
        """Whether this step is scored."""
        return self.every > 0 and step % self.every == 0


NEVER = Scoring()
"""No step is scored."""


class Scored:
    """The mean score per site over the steps that were scored."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0

    def note(self, scores: Mapping[str, float]) -> None:
        """Take in the scores of one step, which are of the same sites each time."""
        self._steps += 1
        for site, score in scores.items():
            self._sums[site] = self._sums.get(site, 0.0) + score

    def mean(self) -> dict[str, float]:
        """Return the means; empty if no step was scored."""
        return {site: total / self._steps for site, total in self._sums.items()}
