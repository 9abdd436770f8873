"""An adapter: the updates of all adapted matrices of a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from polyrank.algebra.delta import Delta, added
from polyrank.errors import FactorError, SiteError
from polyrank.lazy_torch import torch

D = TypeVar("D", bound=Delta, covariant=True)


class Adapter(Mapping[str, D], Generic[D]):
    """A read-only mapping from a site's name to its ΔW, in the order of the names.

    Ranks and kinds may differ from site to site; most adapters are of `LowRank` throughout. Sites
    are compared as sets: the order in which they were given never matters, to sums, hashes or
    iteration.
    """

    def __init__(self, deltas: Mapping[str, D]):
        self._deltas = {site: deltas[site] for site in sorted(deltas)}

    def __getitem__(self, site: str) -> D:
        return self._deltas[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __repr__(self) -> str:
        ranks = sorted({delta.rank for delta in self.values()})
        return f"Adapter({len(self)} sites, ranks {ranks})"

    @property
    def ranks(self) -> dict[str, int]:
        """The stored rank of every site, or what bounds it."""
        return {site: delta.rank for site, delta in self.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all sites."""
        return sum(delta.nbytes for delta in self.values())

    def restrict(self, sites: Iterable[str]) -> Adapter[D]:
        """Return the adapter of the named sites only; SiteError if one is not here."""
        wanted = list(sites)
        missing = sorted(set(wanted) - set(self))
        if missing:
            raise SiteError(f"Adapter.restrict: no such site {missing}; this adapter has {[*self]}")
        return Adapter({site: self[site] for site in wanted})

    def __add__(self, other: Adapter[Delta]) -> Adapter[Any]:
        """Return the exact sum; a site that one of the two lacks counts as zero there."""
        both: dict[str, Delta] = {}
        for site in self.keys() & other.keys():
            if self[site].shape != other[site].shape:
                raise FactorError(
                    f"Adapter: {site!r} is {self[site].shape} in one and {other[site].shape} in "
                    "the other; adapters of different models cannot be added"
                )
            both[site] = added(self[site], other[site])
        return Adapter({**self._deltas, **other._deltas, **both})

    def scale(self, factor: float) -> Adapter[Any]:
        """Return the adapter with every ΔW multiplied by `factor`."""
        return Adapter({site: delta.scale(factor) for site, delta in self.items()})

    def norm(self) -> float:
        """Return (Σ_sites ‖ΔW‖_F²)^½."""
        return math.sqrt(sum(delta.norm() ** 2 for delta in self.values()))

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Adapter[Any]:
        """Return the same updates in another dtype or on another device."""
        return Adapter({s: d.to(dtype=dtype, device=device) for s, d in self.items()})

    @cached_property
    def digest(self) -> str:
        """`hash()`, made once: for an adapter that many hold and nobody changes."""
        return self.hash()

    def hash(self) -> str:
        """Return a SHA-256 (hex) over sites, shapes, dtypes and the bytes of all tensors.

        Two adapters hash alike exactly when their tensors are the same bit by bit.
        """
        digest = hashlib.sha256()
        for site, delta in self.items():
            for factor in delta.tensors().values():
                head = f"{site}|{factor.dtype}|{tuple(factor.shape)}|"
                digest.update(head.encode())
                # A clone, because axes of length one keep odd strides through `contiguous`.
                plain = factor.detach().cpu().clone(memory_format=torch.contiguous_format)
                bits = plain.reshape(-1).view(torch.uint8)
                digest.update(bits.numpy().tobytes())
        return digest.hexdigest()
