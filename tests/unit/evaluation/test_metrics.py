import pytest

from polyrank.errors import PolyrankError
from polyrank.evaluation.metrics import exact_match, rouge_l


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
