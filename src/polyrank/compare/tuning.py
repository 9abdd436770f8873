"""The choice of a learning rate by validation loss over a grid. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

STEPS = (1 / 3, 1.0, 3.0)
"""The grid where none is given: the recipe's rate times these, to two digits."""

EXTENSIONS = 2
"""How often a grid whose edge is best is extended by one rate."""

Edge = Literal["low", "high"]


@dataclass(frozen=True)
class Trial:
    """A rate that was tried: the last validation loss, or the reason why there is none.

    `round` is the round of that evaluation; a loss of None counts as infinitely bad.
    """

    rate: float
    loss: float | None
    round: int | None = None
    failure: str | None = None


def default_grid(rate: float) -> tuple[float, ...]:
    """Return the grid around a rate: a third of it, itself, three times it."""
    return tuple(rate if step == 1 else float(f"{rate * step:.2g}") for step in STEPS)


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of the lowest loss, the smaller rate among equals; None without a loss."""
    usable = [(trial.loss, trial.rate, trial) for trial in trials if trial.loss is not None]
    return min(usable, key=lambda trial: trial[:2])[2] if usable else None


def edge(trials: Sequence[Trial]) -> Edge | None:
    """Return ``low`` or ``high`` if the best rate is the smallest or the largest tried, else None.

    If no rate gave a loss, return ``low``: smaller rates are worth a try. A single rate with a loss
    has no edges, so None.
    """
    rates = sorted(trial.rate for trial in trials)
    chosen = best(trials)
    if chosen is None:
        return "low" if rates else None
    if len(rates) < 2 or chosen.rate not in (rates[0], rates[-1]):
        return None
    return "low" if chosen.rate == rates[0] else "high"


def next_rate(trials: Sequence[Trial]) -> float | None:
    """Return the rate by which to extend the grid: one step beyond the edge that is best.

    The step is the ratio of the two rates at that edge, or 3 if there is one rate; two digits are
    kept. None if the best is no edge.
    """
    side = edge(trials)
    if side is None:
        return None
    rates = sorted((trial.rate for trial in trials), reverse=side == "low")
    step = rates[-1] / rates[-2] if len(rates) > 1 else 1 / STEPS[-1]
    return float(f"{rates[-1] * step:.2g}")
