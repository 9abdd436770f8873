"""What is scored, on how much data, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field

from polyrank.errors import RecipeError


@dataclass(frozen=True)
class Evaluation:
    """What is measured and how often.

    Every `every` rounds and after the last one (0: never) the global adapter is evaluated on the
    validation parts, on up to `examples` per client, the first in the order of the source, at the
    server's rank and, with `own_rank`, also as each client gets it at its own rank. Before the
    first and after the last round it is evaluated on the test parts, and there `generate` examples
    per client are generated, greedily and up to `max_new_tokens`, for exact match and ROUGE-L;
    `generate_every` more often: every so many rounds.

    Between the rounds up to `clients` that train and as many that are held out are scored, before
    and after up to `final_clients` of each (`polyrank.rounds.sampling`): drawn once from the run's
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
