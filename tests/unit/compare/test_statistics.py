import pytest

from polyrank.compare.statistics import Paired, mean, paired, spread


def test_mean_and_sample_spread_of_known_numbers() -> None:
    assert mean([2.0, 4.0, 9.0]) == 5.0
    assert spread([2.0, 4.0, 9.0]) == pytest.approx(13.0**0.5, rel=1e-12)  # (9 + 1 + 16)/2


def test_what_was_not_measured_is_left_out_and_nothing_has_no_mean() -> None:
    assert mean([2.0, None, 4.0]) == 3.0
    assert spread([2.0, None, 4.0]) == pytest.approx(2.0**0.5, rel=1e-12)
    assert (mean([None]), spread([None, 1.0]), mean([]), spread([])) == (None, None, None, None)


def test_a_paired_difference_of_known_numbers() -> None:
    # Differences 1, 2, 6: mean 3, deviation √((4 + 1 + 9)/2) = √7, standard error √(7/3).
    found = paired({"a": 2.0, "b": 4.0, "c": 9.0}, {"c": 3.0, "b": 2.0, "a": 1.0})
    assert (found.mean, found.clients) == (3.0, 3)
    assert found.se == pytest.approx((7 / 3) ** 0.5, rel=1e-12)


def test_only_clients_that_both_have_are_paired() -> None:
    assert paired({"a": 2.0, "x": 100.0}, {"a": 1.5, "y": -7.0}) == Paired(0.5, None, 1)
    assert paired({"x": 1.0}, {"y": 1.0}) == Paired(None, None, 0)


def test_a_client_that_diverged_under_one_method_leaves_no_difference() -> None:
    ours, theirs = {"a": 2.0, "b": None}, {"a": 1.0, "b": 1.0}
    assert paired(ours, theirs) == paired(theirs, ours) == Paired(None, None, 1)


def test_clients_without_a_score_under_either_method_are_passed_over() -> None:
    found = paired({"a": 2.0, "b": None, "c": 1.0}, {"a": 1.0, "b": None, "c": 2.0})
    assert found == Paired(0.0, 1.0, 2)  # Differences 1 and −1: √2/√2.
