"""Settings of a round: how many clients take part, what they weigh, which faults it tolerates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyrank.errors import RecipeError
from polyrank.transport.layout import LONGEST_WAIT


@dataclass(frozen=True)
class Sampling:
    """How many of the clients take part in a round: a `fraction` of them, or a `number`."""

    fraction: float | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.number is not None:
            raise RecipeError("sampling: give fraction or number, not both")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise RecipeError(f"sampling.fraction: expected more than 0, up to 1: {self.fraction}")
        if self.number is not None and self.number < 1:
            raise RecipeError(f"sampling.number: expected at least 1, got {self.number}")

    def count(self, clients: int) -> int:
        """Return how many of `clients` take part; all of them if neither was given.

        A fraction is rounded down, and is at least one client: FlexLoRA's 0.05 of 1,613 is 80 [C].
        """
        if self.number is not None:
            return min(self.number, clients)
        return max(1, math.floor((self.fraction or 1.0) * clients + 1e-9))


@dataclass(frozen=True)
class Weighting:
    """The weight of a client's update: ``examples``, ``equal``, or ``capped`` at `cap` examples.

    No client has more than the share `most` of a round's weights
    (`polyrank.aggregation.weights.capped`); None: any.
    """

    by: Literal["examples", "equal", "capped"] = "examples"
    cap: int | None = None
    most: float | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if (self.by == "capped") != (self.cap is not None) or (
            self.cap is not None and self.cap < 1
        ):
            raise RecipeError("weights: by = 'capped' needs cap, at least 1; the others take none")
        if self.most is not None and not 0 < self.most <= 1:
            raise RecipeError(
                f"aggregation.max_share: expected more than 0, up to 1, got {self.most}"
            )

    def weights(self, examples: Mapping[str, int]) -> dict[str, float]:
        """Return the weights, not yet normalised, from training examples per client."""
        table = {
            "examples": lambda n: n,
            "equal": lambda _: 1,
            "capped": lambda n: min(n, self.cap or n),
        }
        return {client: float(table[self.by](n)) for client, n in examples.items()}


@dataclass(frozen=True)
class Faults:
    """What a round tolerates: `quorum`, the share of its clients whose updates must be accepted.

    Below it the state does not change, and the round is tried with other clients, `attempts` times
    in all. `deadline` is how many seconds a round's clients have to answer; None: as long as it
    takes. An update whose increment ‖ΔW − start‖_F over all sites is above
    `clip_increment` counts shortened to it; one above `max_increment`, as it came, is refused.
    """

    quorum: float = 0.5
    attempts: int = 3
    max_increment: float | None = None
    deadline: float | None = field(default=None, metadata={"later": True})
    clip_increment: float | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1 or self.attempts < 1:
            raise RecipeError("faults: expected 0 < quorum <= 1 and at least one attempt")
        for name in ("max_increment", "deadline", "clip_increment"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"faults.{name}: expected a number above 0, got {value}")
        if self.deadline is not None and self.deadline > LONGEST_WAIT:
            raise RecipeError(
                f"faults.deadline: expected at most {LONGEST_WAIT:.0f} seconds (31 days), got "
                f"{self.deadline}"
            )
