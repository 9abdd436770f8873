"""The dense sum of many low-rank terms, read one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polyrank.algebra.lowrank import LowRank
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Columns of B that go into one product: with few, reading and writing the sum takes the time; from
# about 200 on nothing more is gained.
BATCH = 256
# Rows of the sum per product: 256 rows stay in the cache and in the allocator's small blocks.
_ROWS = 256
# oneDNN keeps a compiled kernel for every shape that it meets, up to a thousand of them. So it gets
# products with matrices that are worth it alone, and ranks rounded up to a multiple of this.
_WORTHWHILE = 1 << 20
_MULTIPLE = 8


def accumulate(terms: Iterator[LowRank]) -> Tensor:
    """Return Σ B_i A_i as a dense m×n matrix in the widest dtype of the terms.

    Terms of small rank are gathered into one product of at most `BATCH` columns; each term is
    dropped after its product. Beside the sum, memory is two such batches: as read, and stacked.
    """
    total: Tensor | None = None
    batch: list[LowRank] = []
    for term in terms:
        if batch and sum(earlier.rank for earlier in batch) + term.rank > BATCH:
            total = _added(total, _drained(batch))
        batch.append(term)
        del term  # the loop's own name would keep it alive while the next one is read
    return _added(total, _drained(batch))


def _drained(batch: list[LowRank]) -> LowRank:
    """Return the terms of the batch stacked, in their widest dtype, and empty the batch."""
    widest = max((term.b.dtype for term in batch), key=lambda dtype: dtype.itemsize)
    stack = LowRank.stack(term.to(dtype=widest) for term in batch)
    batch.clear()
    return stack


def _added(total: Tensor | None, term: LowRank) -> Tensor:
    if total is None:
        total = term.b.new_zeros(term.shape)
    widest = torch.promote_types(total.dtype, term.b.dtype)
    total, b, a = total.to(widest), term.b.to(widest), term.a.to(widest)
    if term.rank > 0 and total.numel() >= _WORTHWHILE and _has_onednn(total):
        more = -term.rank % _MULTIPLE
        right = torch.nn.functional.pad(a.T, (0, more)).contiguous().to_mkldnn()
        b = torch.nn.functional.pad(b, (0, more))
        for rows, left in zip(torch.split(total, _ROWS), torch.split(b, _ROWS), strict=True):
            rows += torch.nn.functional.linear(left.contiguous().to_mkldnn(), right).to_dense()
        return total
    return total.addmm_(b, a)


def _has_onednn(x: Tensor) -> bool:
    """Whether float32 products on this CPU can go through oneDNN.

    It uses the CPU's widest vectors on every make of CPU, torch's default library does not: twice
    as fast was measured on an AMD EPYC with AVX-512.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
