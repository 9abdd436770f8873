"""Shares of a fleet are met as nearly as whole clients allow, whatever they are."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polyrank.errors import RankError
from polyrank.planning import Fleet, LoRAType

PARTS = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


def sampled(parts, count, seed=0):
    total = sum(parts)
    assume(min(part for part in parts if part) * count >= total)  # Fewer may leave a type empty.
    shares = {f"T{i}": part / total for i, part in enumerate(parts)}
    types = {name: LoRAType(name, {"all": 1}) for name in shares}
    ids = [f"c{i}" for i in range(count)]
    return shares, Fleet.sample(ids, shares, types=types, seed=seed)


@given(PARTS, st.integers(1, 300), st.integers(0, 5))
def test_every_client_has_a_type_and_no_count_is_off_by_a_whole_client(parts, count, seed):
    shares, fleet = sampled(parts, count, seed)
    counts = fleet.counts()
    assert sum(counts.values()) == len(fleet.assigned) == count
    for name, share in shares.items():
        assert abs(counts.get(name, 0) - share * count) < 1 + 1e-6


@given(PARTS, st.integers(1, 300))
def test_no_other_rounding_is_nearer(parts, count):
    """Moving one client from a type to another never lowers the squared error."""
    shares, fleet = sampled(parts, count)
    off = {name: fleet.counts().get(name, 0) - share * count for name, share in shares.items()}
    for one in shares:
        for other in shares:
            if one != other and fleet.counts().get(one, 0):
                moved = (off[one] - 1) ** 2 + (off[other] + 1) ** 2
                assert moved >= off[one] ** 2 + off[other] ** 2 - 1e-6


@given(PARTS, st.integers(1, 60))
def test_a_type_of_some_share_has_a_client_or_the_fleet_is_refused(parts, count):
    shares = {f"T{i}": part / sum(parts) for i, part in enumerate(parts)}
    types = {name: LoRAType(name, {"all": 1}) for name in shares}
    ids = [f"c{i}" for i in range(count)]
    if all(share * count >= 1 for share in shares.values() if share):
        counts = Fleet.sample(ids, shares, types=types).counts()
        assert set(counts) == {name for name, share in shares.items() if share}
    elif len([share for share in shares.values() if share]) > count:
        with pytest.raises(RankError, match="no client for type"):
            Fleet.sample(ids, shares, types=types)


@given(PARTS, st.integers(1, 60), st.integers(0, 3))
def test_counts_do_not_depend_on_the_seed(parts, count, seed):
    assert sampled(parts, count, seed)[1].counts() == sampled(parts, count, 99)[1].counts()
