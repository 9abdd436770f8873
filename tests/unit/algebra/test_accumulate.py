"""The dense sum of many terms: exact, and no kernel for every shape that comes along."""

import random
import sys

import pytest
import torch

from polyrank.algebra import LowRank
from polyrank.algebra.factorisations.accumulate import accumulate

module = sys.modules["polyrank.algebra.factorisations.accumulate"]


def terms(size, ranks):
    draw = torch.Generator().manual_seed(0)
    return [
        LowRank(torch.randn(size, rank, generator=draw), torch.randn(rank, size, generator=draw))
        for rank in ranks
    ]


@pytest.mark.parametrize("size", [96, 1024])
def test_the_sum_is_that_of_the_dense_products(size):
    given = terms(size, [1, 7, 0, 30, 200, 300, 5])
    exact = sum(term.b.double() @ term.a.double() for term in given)
    found = accumulate(iter(given))
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-6


def test_kernels_are_made_for_few_shapes_and_large_matrices_alone(monkeypatch):
    """The library keeps a kernel for every shape: thousands of rounds must not fill memory."""
    if not module._has_onednn(torch.zeros(1)):
        pytest.skip("this build of torch has no oneDNN")
    seen = set()
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w: seen.add((*x.shape, *w.shape)) or real(x, w)
    )
    ranks = random.Random(0)
    for _ in range(40):
        accumulate(iter(terms(64, [ranks.randint(1, 60) for _ in range(6)])))
    assert seen == set()
    for _ in range(12):
        accumulate(iter(terms(1024, [ranks.randint(1, 60) for _ in range(9)])))
    assert 1 <= len(seen) <= 256 / 8
    assert all(rank % 8 == 0 for _, rank, *_ in seen)
