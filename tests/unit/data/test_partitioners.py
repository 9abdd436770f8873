"""The partitioners give the parts of flwr-datasets, which is needed for this comparison alone."""

import random
import warnings

import datasets
import pytest
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

from polyrank.data.partitioners import ATTEMPTS, by_value, contiguous, dirichlet
from polyrank.errors import DataError

datasets.disable_progress_bars()


def theirs(partitioner, values):
    """Return the parts that a partitioner of flwr-datasets makes of rows with these values."""
    rows = {"value": values, "place": list(range(len(values)))}
    partitioner.dataset = datasets.Dataset.from_dict(rows)
    count = partitioner.num_partitions
    return [list(partitioner.load_partition(part)["place"]) for part in range(count)]


def values_of(seed, size, distinct):
    draw = random.Random(seed)
    return [draw.randrange(distinct) for _ in range(size)]


@pytest.mark.parametrize(("size", "distinct"), [(1, 1), (7, 3), (60, 60), (200, 5)])
def test_a_part_per_value(size, distinct):
    values = values_of(size, size, distinct)
    oracle = NaturalIdPartitioner("value")
    parts = theirs(oracle, values)
    named = {oracle.partition_id_to_natural_id[i]: part for i, part in enumerate(parts)}
    assert by_value(range(size), values) == named


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (7, 3), (9, 3), (10, 10), (101, 8)])
def test_equal_slices(size, parts):
    ours = [list(part) for part in contiguous(range(size), parts)]
    assert ours == theirs(IidPartitioner(parts), [0] * size)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 3.0, 1000.0])
@pytest.mark.parametrize(("size", "distinct", "parts"), [(40, 1, 3), (90, 4, 1), (300, 12, 9)])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_dirichlet_shares(alpha, size, distinct, parts, seed):
    values = values_of(seed, size, distinct)
    settings = {"alpha": alpha, "seed": seed}
    oracle = DirichletPartitioner(parts, "value", min_partition_size=0, shuffle=False, **settings)
    assert dirichlet(range(size), values, parts, smallest=0, **settings) == theirs(oracle, values)


@pytest.mark.parametrize("seed", range(12))
def test_dirichlet_is_drawn_anew_until_every_part_is_large_enough(seed):
    values = values_of(seed, 60, 3)
    settings = {"alpha": 0.7, "seed": seed}
    oracle = DirichletPartitioner(4, "value", min_partition_size=5, shuffle=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = theirs(oracle, values)
        except ValueError:
            expected = None
    if expected is None:
        with pytest.raises(DataError, match=f"{ATTEMPTS} draws of 60 examples for 4 clients"):
            dirichlet(range(60), values, 4, smallest=5, **settings)
    else:
        assert dirichlet(range(60), values, 4, smallest=5, **settings) == expected


def test_places_may_be_any_of_the_examples():
    values = [0, 1, 0, 1, 0, 1]
    assert by_value([5, 4, 2], values) == {1: [5], 0: [4, 2]}
    assert contiguous([5, 4, 2], 2) == [[5, 4], [2]]
    (part,) = dirichlet([5, 4, 2], values, 1, alpha=1.0, smallest=1, seed=0)
    assert sorted(part) == [2, 4, 5]


def test_a_part_that_cannot_be_filled_is_refused_with_what_to_change():
    with pytest.raises(DataError, match="fewer clients, a larger alpha or a smaller min_examples"):
        dirichlet(range(4), [0, 0, 1, 1], 4, alpha=0.5, smallest=2, seed=0)
