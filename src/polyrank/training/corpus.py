"""How good generated texts are together, each beside its references: BLEU, NIST and ROUGE-L.

The scores are those of sacrebleu, nltk and rouge-score. They depend on how words are told apart, so
figures compare only where that is equal. Here BLEU and NIST are taken in lower case with the
tokenisation of mteval-v13a (sacrebleu's ``13a``), as the E2E challenge's scripts do; its ROUGE-L
counts precision and recall from different references, without stems, and so differs from this one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from polyrank.errors import PolyrankError, RecipeError
from polyrank.training.metrics import check_metrics, rouge_l

NIST_ORDER = 5
"""Longest sequence of words that NIST counts, as in mteval."""


@dataclass(frozen=True)
class CorpusScores:
    """Scores of a corpus: `bleu` in 0…100, `nist` from 0 on, `rouge_l` in 0…1; more is better."""

    bleu: float
    nist: float
    rouge_l: float


def corpus_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScores:
    """Return the scores of texts, each beside its own references, of which there may be any number.

    - BLEU (Papineni et al., 2002), sacrebleu's, to 4 words: exponential smoothing, the brevity
      penalty by the reference of the nearest length.
    - NIST (Doddington, 2002), nltk's, to 5 words: per order of words the reference that gives a
      text most. Orders that no text is long enough for count 0 (nltk divides by zero there).
    - ROUGE-L: the mean over texts of the best F-measure (`metrics.rouge_l`).

    PolyrankError if there is no text, or one without references; RecipeError if a library lacks.
    """
    if not texts or len(texts) != len(references) or not all(references):
        raise PolyrankError(
            f"corpus metrics: expected at least one text, each with references; got {len(texts)} "
            f"texts and {sum(map(bool, references))} lists of references"
        )
    bleu, nist = _libraries()
    most = max(map(len, references))
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    return CorpusScores(
        bleu=float(bleu.corpus_score(list(texts), streams).score),
        nist=_nist(nist, [_words(text) for text in texts], [[*map(_words, r)] for r in references]),
        rouge_l=statistics.fmean(map(rouge_l, texts, references)),
    )


def check_corpus_metrics() -> None:
    """Raise RecipeError if a library that `corpus_scores` needs is missing."""
    try:
        check_metrics()
    except PolyrankError as error:
        raise RecipeError(str(error)) from error
    _libraries()


def _nist(
    nist: Any, texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    longest = max(map(len, texts))
    if not longest or not any(map(len, (r for own in references for r in own))):
        return 0.0
    return float(nist.corpus_nist(references, texts, n=min(NIST_ORDER, longest)))


def _words(text: str) -> list[str]:
    return _libraries()[0].tokenizer(text.lower().rstrip()).split()


@cache
def _libraries() -> tuple[Any, Any]:
    """sacrebleu's BLEU, with its tokenizer, and nltk's NIST."""
    try:
        from nltk.translate import nist_score
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise RecipeError(
            f"BLEU and NIST need the sacrebleu and nltk libraries ({error}): "
            "pip install 'polyrank[metrics]'"
        ) from error
    # `force`: texts may be tokenised already, as those of E2E NLG are; no warning then.
    return BLEU(lowercase=True, tokenize="13a", force=True), nist_score
