"""Settings of evaluation: measures, amounts of data, intervals; on clients and on a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge

from polyrank.settings import check


@dataclass(frozen=True)
class Evaluation:
    """What is measured on clients, and how often.

    Between the rounds the global adapter is scored on the validation parts, before the first and
    after the last round on the test parts.
    """

    every: Annotated[int, Ge(0)] = 1
    """Validate the global adapter every so many rounds, and after the last; 0: never."""
    examples: Annotated[int, Ge(0)] = 32
    """At most so many examples per client for the loss, the first ones in the order of the source;
    0: all."""
    own_rank: bool = True
    """Validate also what each client gets at its own rank."""
    generate: Annotated[int, Ge(0)] = 4
    """Examples per client whose answers are generated, greedily, for exact match and ROUGE-L,
    before the first and after the last round."""
    generate_every: Annotated[int, Ge(0)] = 0
    """Generate also every so many rounds; 0: not in between."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """Longest generated answer, in tokens."""
    batch: Annotated[int, Ge(1)] = 16
    """Examples in a batch of an evaluation."""
    clients: Annotated[int, Ge(0)] = field(default=0, metadata={"later": True})
    """Between the rounds, score at most so many training clients and so many that are held out:
    always the same ones, drawn by the seed, every LoRA type among them; 0: all."""
    final_clients: Annotated[int, Ge(0)] = field(default=0, metadata={"later": True})
    """The same before the first and after the last round."""

    def __post_init__(self) -> None:
        check(self, "evaluation")


@dataclass(frozen=True)
class BenchmarkSettings:
    """How often and on how much a benchmark is measured. What is left out is drawn once."""

    every: Annotated[int, Ge(0)] = 1
    """Take the perplexity every so many rounds; 0: never in between."""
    examples: Annotated[int, Ge(0)] = 0
    """Between the rounds, on at most so many rows, drawn once by the seed; 0: all."""
    final_examples: Annotated[int, Ge(0)] = 0
    """The same before the first and after the last round."""
    generate: Annotated[int, Ge(0)] = 100
    """Texts to generate before the first and after the last round, their inputs drawn once by the
    seed; 0: one for every input."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """Longest generated text, in tokens."""
    batch: Annotated[int, Ge(1)] = 16
    """Examples in a batch."""

    def __post_init__(self) -> None:
        check(self, "benchmark")
