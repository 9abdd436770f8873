"""How a run is conducted: who takes part, how updates weigh, when it is evaluated and stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from polyrank.errors import RecipeError
from polyrank.evaluation.settings import Evaluation
from polyrank.planning import Scaling
from polyrank.rounds.settings import Faults, Sampling, Weighting
from polyrank.training.encoding import Encoding
from polyrank.training.split import SplitSettings


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
class RunSettings:
    """How a run is conducted, beside model, clients, fleet, rule and local training.

    `server_rank` is the rank at which the server keeps the aggregate (default: per site, the
    fleet's largest); `cohort` how many clients train in one pass (``auto``: as memory
    allows, on a CPU up to 2,048 tokens);
    `target_loss` a validation loss, and `target_perplexity` one on the benchmark, whose reaching
    the summary reports; `split` how clients whose
    type is cut talk to the server; `pooled`: all training examples are trained on in one place
    (`polyrank.run.population`).
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
