"""Text metrics: exact match and ROUGE-L of one text, BLEU, NIST and ROUGE-L of a corpus."""

from __future__ import annotations

import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from polyrank.errors import PolyrankError, RecipeError

NIST_ORDER = 5
"""Longest sequence of words that NIST counts, as in mteval."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


# --- of one text ---


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
    uses it. Raises PolyrankError if there is no reference.
    """
    _require(references)
    scorer = _scorer()
    return max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in references)


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _require(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise PolyrankError(
            f"metrics: expected a list of at least one reference, got {references!r}"
        )


# --- of a corpus ---


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


def _nist(
    nist: Any, texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> float:
    longest = max(map(len, texts))
    if not longest or not any(map(len, (r for own in references for r in own))):
        return 0.0
    return float(nist.corpus_nist(references, texts, n=min(NIST_ORDER, longest)))


def _words(text: str) -> list[str]:
    return _libraries()[0].tokenizer(text.lower().rstrip()).split()


# --- the libraries ---


def check_corpus_metrics() -> None:
    """Raise RecipeError if a library that `corpus_scores` needs is missing."""
    _libraries()


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


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
