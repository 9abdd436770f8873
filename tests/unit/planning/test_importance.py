import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrank.errors import UpdateError
from polyrank.planning.importance import TIE, averaged, moved, smoothed, tied

SCORES = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e6), max_size=4)
SOME = SCORES.filter(lambda scores: any(scores.values()))


def test_the_first_scores_are_taken_as_they_are():
    assert smoothed(None, {"a": 3.0, "b": 0.0}, 1, 10) == {"a": 3.0, "b": 0.0}
    assert smoothed({}, {"a": 3.0}, 1, 10) == {"a": 3.0}


def test_smoothing_by_hand():
    """γ = 1 − exp(−(6/4)·(2/3)) = 1 − e⁻¹; 4·(1 − e⁻¹) + 6·e⁻¹ = 4 + 2/e."""
    assert smoothed({"a": 4.0}, {"a": 6.0}, 2, 3)["a"] == pytest.approx(4 + 2 / math.e, rel=1e-14)


def test_early_scores_replace_the_past_and_late_ones_hardly_change_it():
    """γ = 1 − exp(−t/T) at an unchanged size: 0.01 of the past at t = 1, 0.63 at t = T."""
    early, late = (smoothed({"a": 10.0}, {"a": 10.1}, t, 100)["a"] for t in (1, 100))
    assert early == pytest.approx(10.1, rel=2e-4)
    assert late == pytest.approx(10 * (1 - math.exp(-1.01)) + 10.1 * math.exp(-1.01), rel=1e-14)


def test_a_spike_is_damped_and_a_low_score_taken_almost_at_once():
    assert smoothed({"a": 1.0}, {"a": 1e9}, 50, 100)["a"] == pytest.approx(1.0, rel=1e-6)
    assert smoothed({"a": 1.0}, {"a": 1e-3}, 50, 100)["a"] == pytest.approx(1e-3, rel=1.0)
    assert smoothed({"a": 1.0}, {"a": 0.0}, 50, 100)["a"] == 0.0


def test_a_site_at_zero_comes_back():
    """With the past at zero γ would be one, and the site at zero for ever."""
    assert smoothed({"a": 0.0}, {"a": 2.0}, 7, 10) == {"a": 2.0}


def test_a_site_that_is_not_scored_keeps_its_value_and_a_new_one_starts():
    assert smoothed({"a": 5.0}, {"b": 2.0}, 3, 10) == {"a": 5.0, "b": 2.0}


@given(SCORES, SCORES, st.integers(1, 100), st.integers(1, 100))
def test_smoothed_scores_lie_between_the_past_and_the_new(before, now, t, T):
    for site, score in smoothed(before, now, t, T).items():
        both = [scores[site] for scores in (before, now) if site in scores]
        assert min(both) * (1 - 1e-12) <= score <= max(both) * (1 + 1e-12)


def test_scores_far_apart_do_not_overflow():
    assert smoothed({"a": 1e-300}, {"a": 1e300}, 10, 10)["a"] == 1e-300
    assert moved({"a": 1e308, "b": 1e308}, {"a": 1e308, "b": 1e308}) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_are_not_finite_or_negative_are_refused_by_site_and_client(bad):
    with pytest.raises(UpdateError, match=r"new importance at q_proj.*finite"):
        smoothed({"q_proj": 1.0}, {"q_proj": bad}, 1, 2)
    with pytest.raises(UpdateError, match=r"past importance at q_proj"):
        smoothed({"q_proj": bad}, {"q_proj": 1.0}, 1, 2)
    with pytest.raises(UpdateError, match=r"from client anna at q_proj"):
        averaged({"ben": {"q_proj": 1.0}, "anna": {"q_proj": bad}}, {"ben": 1.0, "anna": 1.0})
    with pytest.raises(UpdateError, match=r"importance now at q_proj"):
        moved({"q_proj": 1.0}, {"q_proj": bad})


def test_steps_below_one_are_refused():
    with pytest.raises(UpdateError, match="t = 0 and T = 5"):
        smoothed(None, {"a": 1.0}, 0, 5)
    with pytest.raises(UpdateError, match="t = 1 and T = 0"):
        smoothed(None, {"a": 1.0}, 1, 0)


def test_each_site_is_averaged_over_the_clients_that_scored_it():
    scores = {"anna": {"a": 1.0, "b": 10.0}, "ben": {"a": 4.0}, "cleo": {"c": 7.0}}
    assert averaged(scores, {"anna": 1.0, "ben": 2.0, "cleo": 5.0, "dora": 9.0}) == {
        "a": 3.0,
        "b": 10.0,
        "c": 7.0,
    }


def test_a_client_of_weight_zero_says_nothing():
    assert averaged(
        {"anna": {"a": 1.0}, "ben": {"a": 9.0, "b": 1.0}}, {"anna": 2.0, "ben": 0.0}
    ) == {"a": 1.0}
    assert averaged({}, {}) == {}


def test_a_client_needs_a_weight_that_can_be():
    for weights in ({}, {"anna": math.nan}, {"anna": -1.0}):
        with pytest.raises(UpdateError, match=r"weight .* client anna"):
            averaged({"anna": {"a": 1.0}}, weights)


def test_movement_by_hand():
    """Shares (1/4, 3/4) and (1/2, 1/2): a quarter of all importance moved."""
    assert moved({"a": 1.0, "b": 3.0}, {"a": 5.0, "b": 5.0}) == pytest.approx(0.25, rel=1e-14)


def test_movement_is_none_for_other_scales_and_all_for_other_sites():
    assert moved({"a": 1.0, "b": 3.0}, {"a": 100.0, "b": 300.0}) == pytest.approx(0.0, abs=1e-15)
    assert moved({"a": 1.0}, {"b": 1.0}) == 1.0
    assert moved({"a": 1.0}, {}) == moved({"a": 0.0}, {"a": 2.0}) == 1.0
    assert moved({}, {}) == moved({}, {"a": 0.0}) == 0.0


@given(SOME, SOME, SOME)
def test_movement_is_a_distance_within_one(one, other, third):
    assert 0.0 <= moved(one, other) <= 1.0
    assert moved(one, other) == pytest.approx(moved(other, one), abs=1e-12)
    assert moved(one, one) == 0.0
    assert moved(one, third) <= moved(one, other) + moved(other, third) + 1e-12


def test_scores_within_a_ten_thousandth_become_equal_to_the_largest():
    scores = {"a": 1.0, "b": 1.0 - TIE / 2, "c": 1.0 - 2 * TIE, "d": 0.0}
    assert tied(scores) == {"a": 1.0, "b": 1.0, "c": 1.0 - 2 * TIE, "d": 0.0}
    assert list(tied({"z": 1.0, "a": 2.0})) == ["z", "a"]


@given(SCORES)
def test_tied_scores_keep_their_order_and_grow_by_no_more_than_the_tie(scores):
    made = tied(scores)
    for one, score in scores.items():
        assert score <= made[one] <= score / (1 - TIE) * (1 + 1e-12)
        for other in scores:
            assert not (scores[one] > scores[other] and made[one] < made[other])
