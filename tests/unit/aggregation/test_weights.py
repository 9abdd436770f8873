"""Weights: normalised, and refused with the name of the client."""

import math

import pytest

from polyrank.aggregation import normalised
from polyrank.errors import RuleError


def test_weights_are_shares_in_the_given_order():
    assert normalised([1, 3]) == [0.25, 0.75]
    assert normalised({"b": 3, "a": 1}) == [0.75, 0.25]
    assert normalised([0.0, 5.0]) == [0.0, 1.0]


def test_weights_sum_to_one_at_any_size():
    for weights in ([0.1] * 1613, [1e308, 1e308, 1e308], [5e-324, 5e-324], range(1, 500)):
        assert math.fsum(normalised(weights)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_negative_or_non_finite_weight_names_its_client(bad):
    with pytest.raises(RuleError, match="client 'ada'"):
        normalised({"bob": 1.0, "ada": bad})
    with pytest.raises(RuleError, match="weight 1"):
        normalised([1.0, bad])


@pytest.mark.parametrize("weights", [[], {}, [0, 0], {"ada": 0.0}])
def test_nothing_to_weigh_is_refused(weights):
    with pytest.raises(RuleError, match="positive"):
        normalised(weights)
