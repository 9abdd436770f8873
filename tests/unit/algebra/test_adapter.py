"""Adapter: sites to deltas, differing ranks, restriction, sums, hashes."""

import pytest
import torch

from polyrank.algebra import Adapter, LowRank
from polyrank.errors import FactorError, SiteError


def planted(m: int, n: int, r: int, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, r, generator=draw), torch.randn(r, n, generator=draw))


@pytest.fixture
def adapter() -> Adapter:
    return Adapter({"q": planted(6, 5, 2), "down": planted(5, 9, 3, seed=1)})


def test_sites_come_in_the_order_of_their_names(adapter):
    assert [*adapter] == ["down", "q"]
    assert adapter.ranks == {"down": 3, "q": 2}


def test_sum_counts_a_missing_site_as_zero(adapter):
    other = Adapter({"q": planted(6, 5, 1, seed=2), "up": planted(9, 5, 1, seed=3)})
    total = adapter + other
    assert total.ranks == {"down": 3, "q": 3, "up": 1}
    torch.testing.assert_close(total["q"].dense(), adapter["q"].dense() + other["q"].dense())
    assert total["up"] is other["up"]


def test_sum_of_different_shapes_names_the_site(adapter):
    with pytest.raises(FactorError, match="'q'"):
        adapter + Adapter({"q": planted(5, 6, 1)})


def test_norm_and_scale_run_over_all_sites(adapter):
    dense = torch.cat([delta.dense().flatten() for delta in adapter.values()])
    assert adapter.scale(-2.0).norm() == pytest.approx(2 * float(dense.norm()), rel=1e-6)


def test_restrict_keeps_the_named_sites_and_names_missing_ones(adapter):
    assert [*adapter.restrict(["q"])] == ["q"]
    with pytest.raises(SiteError, match="'nowhere'"):
        adapter.restrict(["q", "nowhere"])


def test_hash_is_that_of_bits_sites_and_shapes_not_of_order_or_memory(adapter):
    again = Adapter({"down": adapter["down"], "q": adapter["q"]})
    strided = Adapter({s: LowRank(d.b.T.contiguous().T, d.a) for s, d in adapter.items()})
    assert adapter.hash() == again.hash() == strided.hash()
    moved = torch.nextafter(adapter["q"].b, torch.tensor(9.0))
    different = [
        Adapter({**adapter, "q": LowRank(moved, adapter["q"].a)}),
        Adapter({"down": adapter["down"], "k": adapter["q"]}),
        adapter.to(dtype=torch.float64),
        adapter.restrict(["q"]),
        adapter.scale(2.0),
    ]
    assert len({adapter.hash(), *(one.hash() for one in different)}) == 6


def test_hash_of_rank_zero_and_of_half_precision():
    empty = Adapter({"q": LowRank.zero(3, 4)})
    assert empty.hash() != Adapter({"q": LowRank.zero(4, 3)}).hash()
    half = Adapter({"q": planted(3, 4, 1)}).to(dtype=torch.bfloat16)
    assert half.hash() != Adapter({"q": planted(3, 4, 1)}).hash()


def test_an_adapter_cannot_be_written_to(adapter):
    with pytest.raises(TypeError):
        adapter["q"] = planted(6, 5, 1)
