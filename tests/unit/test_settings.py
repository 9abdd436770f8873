"""How many clients take part in a round."""

import pytest

from polyrank.federation import Sampling


@pytest.mark.parametrize(
    ("sampling", "clients", "expected"),
    [
        (Sampling(fraction=0.05), 1613, 80),  # FlexLoRA's own: rounded down.
        (Sampling(fraction=0.3), 10, 3),  # 0.3 · 10 is 3, whatever binary fractions make of it.
        (Sampling(fraction=0.29), 100, 29),  # 28.999999999999996 in floating point.
        (Sampling(fraction=0.01), 10, 1),
        (Sampling(fraction=1.0), 10, 10),
        (Sampling(), 7, 7),
        (Sampling(number=4), 7, 4),
        (Sampling(number=9), 7, 7),
    ],
)
def test_a_fraction_is_rounded_down_and_nobody_is_asked_twice(sampling, clients, expected):
    assert sampling.count(clients) == expected
