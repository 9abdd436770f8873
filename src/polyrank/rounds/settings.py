"""Settings of a round: how many clients take part, what they weigh, which faults it tolerates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from polyrank.errors import RecipeError
from polyrank.settings import LONGEST_WAIT, check


@dataclass(frozen=True)
class Sampling:
    """How many training clients take part in a round; all of them if neither key is given."""

    fraction: Annotated[float, Interval(gt=0, le=1)] | None = None
    """A fraction of them, rounded down, at least one."""
    number: Annotated[int, Ge(1)] | None = None
    """A number of them, instead of `fraction`."""

    def __post_init__(self) -> None:
        check(self, "sampling")
        if self.fraction is not None and self.number is not None:
            raise RecipeError("sampling: give fraction or number, not both")

    def count(self, clients: int) -> int:
        """Return how many of `clients` take part.

        A fraction is rounded down, and is at least one client: FlexLoRA's 0.05 of 1,613 is 80 [C].
        """
        if self.number is not None:
            return min(self.number, clients)
        return max(1, math.floor((self.fraction or 1.0) * clients + 1e-9))


@dataclass(frozen=True)
class Weighting:
    """How much each client's update counts in a round."""

    weights: Literal["examples", "equal", "capped"] = field(
        default="examples", metadata={"stored": "by"}
    )
    """A client's weight: its training examples, 1, or its examples up to `cap`."""
    cap: Annotated[int, Ge(1)] | None = None
    """The most examples that count, with `capped`."""
    max_share: Annotated[float, Interval(gt=0, le=1)] | None = field(
        default=None, metadata={"stored": "most", "later": True}
    )
    """No client's weight in a round is more than this share of all weights; what is taken off is
    shared among the others in proportion. Clients too few for it weigh equally. It holds for each
    matrix among the clients that train it; left out, any share."""

    def __post_init__(self) -> None:
        check(self, "aggregation")
        if (self.weights == "capped") != (self.cap is not None):
            raise RecipeError(
                "aggregation.weights = 'capped' needs aggregation.cap, and the others take none; "
                f"got {self.weights!r} and {self.cap}"
            )

    def of(self, examples: Mapping[str, int]) -> dict[str, float]:
        """Return the weights, not yet normalised, from training examples per client."""
        table = {
            "examples": lambda n: n,
            "equal": lambda _: 1,
            "capped": lambda n: min(n, self.cap or n),
        }
        return {client: float(table[self.weights](n)) for client, n in examples.items()}


@dataclass(frozen=True)
class Faults:
    """What a round tolerates.

    Below the quorum the state does not change, and the round is tried with other clients. An
    update's increment is ‖ΔW − what the client was sent‖, over all matrices together, in the
    Frobenius norm.
    """

    quorum: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of a round's clients whose updates must be usable."""
    attempts: Annotated[int, Ge(1)] = 3
    """How often a round is tried, with other clients, before the run ends."""
    max_increment: Annotated[float, Gt(0)] | None = None
    """Refuse updates whose increment is larger; left out, any is accepted."""
    deadline: Annotated[float, Interval(gt=0, le=LONGEST_WAIT)] | None = field(
        default=None, metadata={"later": True}
    )
    """Seconds that the clients of a round have to answer, at most 31 days. Later answers are not
    aggregated, and their clients count as missing. Left out, as long as it takes."""
    clip_increment: Annotated[float, Gt(0)] | None = field(default=None, metadata={"later": True})
    """Shorten larger increments to this, in the same norm, instead of refusing the update;
    `max_increment` is checked before. Left out, none."""

    def __post_init__(self) -> None:
        check(self, "faults")
