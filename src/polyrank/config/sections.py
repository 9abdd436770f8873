"""Sections of a recipe that hold several rooms' settings: [aggregation] and [benchmark]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from polyrank.aggregation.settings import RuleSettings
from polyrank.errors import RecipeError
from polyrank.evaluation.settings import BenchmarkSettings
from polyrank.rounds.settings import Weighting


@dataclass(frozen=True, kw_only=True)
class AggregationSection(Weighting, RuleSettings):
    """How clients' updates become the next global adapter."""

    server_rank: Annotated[int, Ge(1)] | None = None
    """Rank at which the server keeps the aggregate; left out, per matrix the fleet's largest."""


@dataclass(frozen=True)
class _Sources:
    """Held-out sources."""

    validation: str | None = None
    """A source of which the loss and the perplexity of completions are taken, token by token."""
    validation_split: str | None = None
    """Which split of it, where it has several."""
    test: str | None = None
    """A source for whose inputs texts are generated, for BLEU, NIST and ROUGE-L. Rows with the same
    prompt and input are one, with the references of all."""
    test_split: str | None = None
    """Which split of it, where it has several."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSection(BenchmarkSettings, _Sources):
    """Measure on sources that belong to no client, such as a data set's official parts.

    They are read as `data.source` is: format, columns, separator, template and length are those of
    `[data]`. See [data](data.md#a-benchmark) for what is measured.
    """

    def __post_init__(self) -> None:
        BenchmarkSettings.__post_init__(self)
        if self.validation is None and self.test is None:
            raise RecipeError("benchmark: give validation, test, or both: sources to measure on")
