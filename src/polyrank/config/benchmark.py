"""The section of a recipe that names held-out sources to measure on.

The text below a key is its entry in docs/reference/recipes.md, which is made from here.
"""

from __future__ import annotations

from polyrank.config.section import Section
from polyrank.errors import RecipeError
from polyrank.evaluation import BenchmarkSettings


class BenchmarkSection(Section):
    """Measure on sources that belong to no client, such as a data set's official parts.

    They are read as `data.source` is: format, columns, separator, template and length are those of
    `[data]`. See [data](data.md#a-benchmark) for what is measured.
    """

    validation: str | None = None
    """A source of which the loss and the perplexity of completions are taken, token by token."""
    validation_split: str | None = None
    """Which split of it, where it has several."""
    test: str | None = None
    """A source for whose inputs texts are generated, for BLEU, NIST and ROUGE-L. Rows with the same
    prompt and input are one, with the references of all."""
    test_split: str | None = None
    """Which split of it, where it has several."""
    every: int = 1
    """Take the perplexity every so many rounds; 0: never in between."""
    examples: int = 0
    """Between the rounds, on at most so many rows, drawn once by the seed; 0: all."""
    final_examples: int = 0
    """The same before the first and after the last round."""
    generate: int = 100
    """Texts to generate before the first and after the last round, their inputs drawn once by the
    seed; 0: one for every input."""
    max_new_tokens: int = 64
    """Longest generated text, in tokens."""
    batch: int = 16
    """Examples in a batch."""

    def build(self) -> BenchmarkSettings:
        """Return the settings; RecipeError if no source is named."""
        if self.validation is None and self.test is None:
            raise RecipeError("benchmark: give validation, test, or both: sources to measure on")
        return BenchmarkSettings(
            every=self.every,
            examples=self.examples,
            final_examples=self.final_examples,
            generate=self.generate,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
        )
