"""How a run is conducted: who takes part, how updates weigh, when it is evaluated and stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyrank.errors import RecipeError
from polyrank.planning import Scaling
from polyrank.training.split import SplitSettings
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
class Evaluation:
    """What is measured and how often.

    Every `every` rounds (0: never in between) the global adapter is evaluated on the validation
    parts, on up to `examples` per client, the first in the order of the source, at the server's
    rank and, with `own_rank`, also as each client gets it at its own rank. Before the first and
    after the last round it is evaluated on the test parts, and there `generate` examples per client
    are generated, greedily and up to `max_new_tokens`, for exact match and ROUGE-L;
    `generate_every` more often: every so many rounds.

    Between the rounds up to `clients` that train and as many that are held out are scored, before
    and after up to `final_clients` of each (`polyrank.federation.panel`): drawn once from the run's
    seed. A limit of 0 for `examples`, `clients` or `final_clients` means all.
    """

    every: int = 1
    examples: int = 32
    own_rank: bool = True
    generate: int = 0
    generate_every: int = 0
    max_new_tokens: int = 64
    batch: int = 16
    clients: int = field(default=0, metadata={"later": True})
    final_clients: int = field(default=0, metadata={"later": True})

    def __post_init__(self) -> None:
        for name in (
            "every",
            "examples",
            "generate",
            "generate_every",
            "clients",
            "final_clients",
        ):
            if getattr(self, name) < 0:
                raise RecipeError(f"evaluation.{name}: expected at least 0")
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"evaluation.{name}: expected at least 1")


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens; see `polyrank.data.encode`.

    `max_length` 0 means the model's context.
    """

    max_length: int = 0
    template: str = "auto"
    loss_on: Literal["completion", "all"] = "completion"
    too_long: Literal["skip", "cut-prompt", "error"] = "skip"


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations without a validation loss lower by `min_delta`.

    The result is then the adapter of the best evaluation, unless `restore_best` is off.
    """

    patience: int
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise RecipeError(f"early_stopping.patience: expected at least 1, got {self.patience}")


@dataclass(frozen=True)
class Faults:
    """What a round tolerates: `quorum`, the share of its clients whose updates must be accepted.

    Below it the state does not change, and the round is tried with other clients, `attempts` times
    in all. `deadline` is how many seconds a round's clients have to answer; None: as long as it
    takes. An update whose increment ‖ΔW − what was dealt‖_F over all sites is above
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


@dataclass(frozen=True)
class Conduct:
    """How a run is conducted, beside model, clients, fleet, rule and local training.

    `server_rank` is the rank at which the server keeps the aggregate (default: per site, the
    fleet's largest); `cohort` how many clients train in one pass (``auto``: as memory
    allows, on a CPU up to 2,048 tokens);
    `target_loss` a validation loss, and `target_perplexity` one on the benchmark, whose reaching
    the summary reports; `split` how clients whose
    type is cut talk to the server; `pooled`: all training examples are trained on in one place
    (`polyrank.federation.population`).
    """

    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    weights: Weighting = field(default_factory=Weighting)
    scaling: Scaling = field(default_factory=Scaling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    stopping: EarlyStopping | None = None
    encoding: Encoding = field(default_factory=Encoding)
    faults: Faults = field(default_factory=Faults)
    server_rank: int | None = None
    cohort: int | Literal["auto"] = "auto"
    target_loss: float | None = None
    split: SplitSettings = field(default=SplitSettings(), metadata={"later": True})
    pooled: bool = field(default=False, metadata={"later": True})
    target_perplexity: float | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.server_rank is not None and self.server_rank < 1:
            raise RecipeError(
                f"aggregation.server_rank: expected at least 1, got {self.server_rank}"
            )
        if self.cohort != "auto" and self.cohort < 1:
            raise RecipeError(f"engine.cohort: expected auto or at least 1, got {self.cohort}")
        if self.target_loss is not None and not math.isfinite(self.target_loss):
            raise RecipeError(f"target_loss: expected a finite number, got {self.target_loss}")
        if self.target_perplexity is not None and not 1 <= self.target_perplexity < math.inf:
            raise RecipeError(
                f"target_perplexity: expected a number from 1 on, got {self.target_perplexity}"
            )
