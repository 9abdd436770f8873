"""How good a generated text is, beside its references."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

from polyrank.errors import PolyrankError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(text: str, references: Sequence[str]) -> float:
    """Return 1.0 if the text equals a reference after normalisation, else 0.0.

    Normalised as in the evaluation of Natural Instructions v2 (arXiv 2204.07705, its released
    script): lower case, ASCII punctuation removed, runs of white space made one space. Raises
    PolyrankError if there is no reference.
    """
    _require(references)
    return float(any(_normalise(text) == _normalise(reference) for reference in references))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure over the references, in [0, 1].

    The F-measure of the longest common subsequence of words (Lin, 2004), as the rouge-score library
    computes it with the Porter stemmer, which is how Natural Instructions v2 (arXiv 2204.07705)
    uses it. Raises PolyrankError if there is no reference or the library is missing.
    """
    _require(references)
    scorer = _scorer()
    return max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in references)


def check_metrics() -> None:
    """Raise PolyrankError if a library that the text metrics need is missing."""
    _scorer()


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise PolyrankError(
            f"metrics: expected a list of at least one reference, got {references!r}"
        )


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise PolyrankError(
            "ROUGE-L needs the rouge-score library: pip install 'polyrank[metrics]'"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
