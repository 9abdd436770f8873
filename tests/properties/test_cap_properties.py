"""The cap on a client's share: it holds, it keeps the order, and it is the one fair solution."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyrank.aggregation.weights import capped, normalised
from polyrank.errors import RuleError

SIZES = st.one_of(
    st.integers(1, 10**6).map(float),
    st.floats(1e-300, 1e300),
    st.sampled_from([1.0, 1.0 + 2**-52]),
)
WEIGHTS = st.lists(SIZES, min_size=1, max_size=40).map(
    lambda sizes: {f"c{i}": size for i, size in enumerate(sizes)}
)
SHARES = st.floats(1e-3, 1.0)
ROUNDING = 1e-11  # relative: forty float64 sums, and 1e-12 within which a share counts as capped


def shares(weights):
    return dict(zip(weights, normalised(weights), strict=True))


@given(WEIGHTS, SHARES)
def test_no_share_is_above_the_cap_unless_it_must_be(weights, most):
    found = shares(capped(weights, most))
    assert [*found] == [*weights]
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    assert max(found.values()) <= max(most, 1 / len(weights)) * (1 + ROUNDING)
    assert min(found.values()) >= 0


@given(WEIGHTS, SHARES)
def test_who_is_below_the_cap_keeps_the_proportions_and_who_loses_is_at_it(weights, most):
    before, after = shares(weights), shares(capped(weights, most))
    if most * len(weights) <= 1:
        if max(before.values()) > 1 / len(weights) * (1 + ROUNDING):
            assert all(share == pytest.approx(1 / len(weights)) for share in after.values())
        return
    free = [c for c in weights if after[c] < most * (1 - ROUNDING) and before[c] > 1e-300]
    factors = [after[c] / before[c] for c in free]
    assert all(f == pytest.approx(factors[0], rel=1e-9) for f in factors)
    assert all(f >= 1 - ROUNDING for f in factors)
    for client in weights:
        if after[client] < before[client] * (1 - 1e-9):
            assert after[client] == pytest.approx(most, rel=1e-9)


@given(WEIGHTS, SHARES)
def test_more_examples_never_weigh_less(weights, most):
    after = capped(weights, most)
    ordered = sorted(weights, key=weights.__getitem__)
    for one, other in pairwise(ordered):
        assert after[one] <= after[other] * (1 + ROUNDING)


@given(WEIGHTS, SHARES)
def test_a_cap_that_binds_nobody_changes_no_bit_and_twice_is_once(weights, most):
    once = capped(weights, most)
    assert capped(weights, None) == weights
    assert capped(weights, max(shares(weights).values())) == weights
    if most * len(weights) > 1:
        assert capped(once, most) == once


def test_the_excess_is_shared_in_proportion_again_and_again():
    # 60 of 100 is cut to 40; 30 of the other 40 would then be 45, and is cut as well.
    assert capped({"a": 60.0, "b": 30.0, "c": 5.0, "d": 5.0}, 0.4) == {
        "a": 0.4,
        "b": 0.4,
        "c": pytest.approx(0.1),
        "d": pytest.approx(0.1),
    }


def test_clients_without_weight_get_none_and_do_not_count():
    assert capped({"a": 9.0, "b": 0.0, "c": 1.0}, 0.4) == {"a": 0.5, "b": 0.0, "c": 0.5}
    assert capped({"a": 0.0, "b": 3.0}, 0.1) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("most", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_means_nothing_is_refused(most):
    with pytest.raises(RuleError, match=r"share in \(0, 1\]"):
        capped({"a": 1.0}, most)


def test_weights_are_judged_as_ever():
    with pytest.raises(RuleError, match="client 'a' has weight -1"):
        capped({"a": -1.0, "b": 1.0}, 0.5)
