"""Size limits of packets, checked before anything in them is read."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.aggregation import Assignment

_ROOM = 2**18
"""Bytes of a header beside its sites: names, metrics, a reason."""
_PER_SITE = 2**10
"""Bytes of a header per site and tensor: a name, a type, a shape, offsets, a number."""


@dataclass(frozen=True)
class SizeLimits:
    """The most bytes of a packet and of its header, and the most tensors.

    A reader compares the length and the header's with them before it parses anything. Parsed JSON
    takes up to 30 times its bytes, so a header is bounded by itself.
    """

    nbytes: int
    header: int
    tensors: int

    @staticmethod
    def of(assignment: Assignment, sites: int = 0) -> SizeLimits:
        """Return the limits of the result of an assignment, whatever dtype it was trained in.

        `sites` is the number of the model's sites, as each may come with an importance.
        """
        tensors = [
            tensor for delta in assignment.start.values() for tensor in delta.tensors().values()
        ]
        header = _ROOM + _PER_SITE * (len(tensors) + sites)
        numbers = sum(tensor.numel() for tensor in tensors)
        return SizeLimits(8 + header + 8 * numbers, header, len(tensors))


WITH_TENSORS = SizeLimits(2**33, 2**25, 2**18)
"""Of requests, which carry adapters."""
WITHOUT_TENSORS = SizeLimits(2**22, 2**22, 0)
"""Of what carries names and numbers alone."""
