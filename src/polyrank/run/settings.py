"""Settings of a run: sampling, weights, evaluation, early stopping, faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from polyrank.errors import RecipeError
from polyrank.evaluation.settings import Evaluation
from polyrank.planning import Scaling
from polyrank.rounds.settings import Faults, Sampling, Weighting
from polyrank.settings import Expected, check
from polyrank.training.encoding import Encoding
from polyrank.training.split.settings import SplitSettings

Cohort = Annotated[Literal["auto"] | Annotated[int, Ge(1)], Expected("'auto' or a whole number")]


@dataclass(frozen=True)
class EarlyStopping:
    """Stop early on the validation loss; left out, all rounds are run."""

    patience: Annotated[int, Ge(1)]
    """Evaluations without a lower loss after which the run ends."""
    min_delta: float = 0.0
    """A loss counts as lower if it is so by this much."""
    restore_best: bool = True
    """The result is the adapter of the best evaluation, not of the last round."""

    def __post_init__(self) -> None:
        check(self, "early_stopping")


@dataclass(frozen=True)
class EngineSettings:
    """How the work is executed."""

    threads: Annotated[int, Ge(0)] = 0
    """Threads of torch; 0: one for each core. What was chosen is stored with the run."""
    cohort: Cohort = "auto"
    """Clients trained in one pass; `auto`: as memory allows, on a CPU up to 2,048 tokens a pass."""
    deterministic: bool = False
    """One client at a time. All engines then give the same bytes, on one machine with the same
    versions and threads, where the same clients take part and `split.wire` is `float32`."""

    def __post_init__(self) -> None:
        check(self, "engine")
        if self.deterministic and self.cohort not in ("auto", 1):
            raise RecipeError("engine: deterministic trains one client at a time; drop cohort")

    @property
    def clients_in_one_pass(self) -> int | Literal["auto"]:
        """The cohort's size, or ``auto``."""
        return 1 if self.deterministic else self.cohort


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
    server_rank: Annotated[int, Ge(1)] | None = None
    cohort: Cohort = "auto"
    target_loss: float | None = None
    split: SplitSettings = field(default=SplitSettings(), metadata={"later": True})
    pooled: bool = field(default=False, metadata={"later": True})
    target_perplexity: Annotated[float, Ge(1)] | None = field(
        default=None, metadata={"later": True}
    )

    def __post_init__(self) -> None:
        check(self, "RunSettings")
