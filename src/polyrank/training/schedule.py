"""Learning-rate schedules after the warm-up, as pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(_: float) -> float:
    """Return 1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """Return 1 − progress: the factor falls to 0 at progress 1."""
    return max(0.0, 1.0 - progress)


def cosine(progress: float) -> float:
    """Return (1 + cos(π·progress))/2: half a wave, from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


FACTORS: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
"""The factor on the learning rate at progress 0…1 of the steps after the warm-up, by name.

With the linear warm-up of `LocalTraining.rate` they are transformers' ``get_*_schedule`` functions.
The number of warm-up steps is rounded down here, so that a client with few steps does not spend its
only one at a rate of 0.
"""
