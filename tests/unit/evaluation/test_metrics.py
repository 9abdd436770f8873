"""Text metrics: by hand, and beside what the libraries document."""

import math
import sys

import pytest

from polyrank.errors import PolyrankError, RecipeError
from polyrank.evaluation import metrics
from polyrank.evaluation.metrics import check_corpus_metrics, corpus_scores, exact_match, rouge_l


def test_exact_match_ignores_case_punctuation_and_white_space():
    assert exact_match("  The  answer,\nis: YES! ", ["no", "the answer is yes"]) == 1.0


def test_exact_match_keeps_articles_and_order():
    assert exact_match("answer is yes", ["the answer is yes"]) == 0.0
    assert exact_match("is answer the yes", ["the answer is yes"]) == 0.0


def test_rouge_l_by_hand():
    # Common subsequence "a b d" of 4 and 5 words: P = 3/4, R = 3/5, F = 2/3.
    assert rouge_l("x1 x2 x4 z", ["x1 x2 x3 x4 x5"]) == pytest.approx(2 / 3)


def test_rouge_l_stems_and_takes_the_best_reference():
    assert rouge_l("running dogs", ["cats", "run dog"]) == 1.0
    assert rouge_l("", ["cats"]) == 0.0


@pytest.mark.parametrize("metric", [exact_match, rouge_l])
@pytest.mark.parametrize("references", [[], "one string"])
def test_references_must_be_a_list_of_some(metric, references):
    with pytest.raises(PolyrankError, match="at least one reference"):
        metric("text", references)


# --- of a corpus ---


def test_bleu_by_hand() -> None:
    # Of "a b c d e" beside "a b c d x": 4/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples.
    found = corpus_scores(["a b c d e"], [["a b c d x"]])
    assert found.bleu == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_a_text_that_is_too_short_is_penalised_by_the_nearest_reference() -> None:
    # All of "a b c d" is in the references, of which that of 5 words is the nearest.
    found = corpus_scores(["a b c d"], [["a b c d e", "a b c d e f g"]])
    assert found.bleu == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_counts_are_summed_over_the_corpus_before_they_are_divided() -> None:
    # Words: 8 of 8 and 0 of 8; so 1/2 of each order but that of the orders of the second.
    found = corpus_scores(["a b c d e f g h", "i j k l m n o p"], [["a b c d e f g h"], ["q " * 8]])
    assert found.bleu == pytest.approx(50.0)


def test_nist_by_hand() -> None:
    # 4 words, each once among 4: log2 4 = 2 bits each. Longer orders tell nothing more: 0 bits.
    assert corpus_scores(["a b c d"], [["a b c d"]]).nist == pytest.approx(2.0)
    # "a b a c": a weighs log2(4/2) = 1 twice, b and c 2 each: 6/4. Pairs: "a b" and "a c" weigh
    # log2(2/1) = 1 each, "b a" log2(1/1) = 0: 2/3. Triples and quadruples: 0.
    assert corpus_scores(["a b a c"], [["a b a c"]]).nist == pytest.approx(6 / 4 + 2 / 3)


def test_nist_is_what_nltk_documents_for_texts_of_its_own() -> None:
    guide = "It is a guide to action which ensures that the military always obeys the commands of"
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the "
        "command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    found = corpus_scores([f"{guide} the party".lower()], [[one.lower() for one in references]])
    from nltk.translate.nist_score import sentence_nist

    split = [one.lower().split() for one in references]
    assert found.nist == pytest.approx(sentence_nist(split, f"{guide} the party".lower().split()))
    assert 3.0 < found.nist < 4.5  # nltk documents 3.3709 with case, where "Party" is another word


def test_rouge_l_is_the_mean_of_each_texts_best() -> None:
    # Exact beside the second reference; then 2 of 4 words in order, of 4: F = 1/2.
    found = corpus_scores(["w x y z", "w x c d"], [["q", "w x y z"], ["w x y z"]])
    assert found.rouge_l == pytest.approx((1 + 1 / 2) / 2)


def test_case_and_the_space_before_a_full_stop_make_no_difference() -> None:
    found = corpus_scores(["The Mill is a Pub."], [["the mill is a pub ."]])
    assert found.bleu == pytest.approx(100)
    assert found.nist == pytest.approx(math.log2(6))
    assert found.rouge_l == 1.0


def test_one_more_reference_never_makes_a_text_of_its_length_worse() -> None:
    one = corpus_scores(["a b c d e", "f g h i j"], [["a b x d e"], ["f g h i j"]])
    many = corpus_scores(["a b c d e", "f g h i j"], [["a b x d e", "a b c d y"], ["f g h i j"]])
    assert many.bleu > one.bleu
    assert many.rouge_l >= one.rouge_l


@pytest.mark.parametrize("texts", [["", ""], ["  ", ""]])
def test_empty_texts_score_nothing(texts: list[str]) -> None:
    found = corpus_scores(texts, [["a b c d"], ["e f g h", "i"]])
    assert (found.bleu, found.nist, found.rouge_l) == (0.0, 0.0, 0.0)


def test_an_empty_text_among_others_lowers_all_scores() -> None:
    full = corpus_scores(["a b c d e f"], [["a b c d e f"]])
    half = corpus_scores(["a b c d e f", ""], [["a b c d e f"], ["g h i j k l"]])
    assert 0 < half.bleu < full.bleu
    assert half.rouge_l == 0.5


def test_orders_that_no_text_is_long_enough_for_count_nothing() -> None:
    """nltk divides by zero there."""
    assert corpus_scores(["a b"], [["a b"]]).nist == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("texts", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])]
)
def test_every_text_needs_references(texts: list[str], references: list[list[str]]) -> None:
    with pytest.raises(PolyrankError, match="at least one text, each with references"):
        corpus_scores(texts, references)


@pytest.mark.parametrize("missing", ["sacrebleu.metrics", "nltk.translate"])
def test_a_missing_library_is_named_with_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics._libraries.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RecipeError, match=r"pip install 'polyrank\[metrics\]'"):
        check_corpus_metrics()
    metrics._libraries.cache_clear()
