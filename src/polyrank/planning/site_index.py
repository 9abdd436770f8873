"""The sites of a model by the blocks that hold them, with the ranks of one client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from polyrank.errors import RankError, SiteError
from polyrank.planning.anatomy import Anatomy
from polyrank.planning.spec import ModelSpec, Site

Ranks = Mapping[str, int]


class SiteIndex:
    """Sites by block and by their place in it, which is the same in all blocks of a kind."""

    def __init__(self, anatomy: Anatomy, spec: ModelSpec):
        self._sites: list[list[tuple[str, Site]]] = [[] for _ in anatomy.blocks]
        for site in spec.sites:
            place = site.name.removeprefix(f"{anatomy.blocks[site.block].prefix}.")
            self._sites[site.block].append((place, site))
        self._names = frozenset(site.name for site in spec.sites)

    def of(self, block: int) -> list[tuple[str, Site]]:
        """Return the places and sites of a block."""
        return self._sites[block]

    def active(self, block: int, ranks: Ranks) -> dict[str, int]:
        """Return the ranks of a block's adapted sites by their places."""
        ranks_here = {place: ranks.get(site.name, 0) for place, site in self._sites[block]}
        return {place: rank for place, rank in ranks_here.items() if rank}

    def factors(self, ranks: Ranks, blocks: Iterable[int]) -> int:
        """Return the numbers in the factors of some blocks."""
        return sum(
            ranks.get(site.name, 0) * (site.m + site.n)
            for block in blocks
            for _, site in self._sites[block]
        )

    def check(self, ranks: Ranks) -> None:
        """Raise SiteError for a rank of an unknown site, RankError for one below 0."""
        unknown = sorted(set(ranks) - self._names)
        if unknown:
            raise SiteError(f"costs: ranks at {unknown[:5]}, which are not sites of the model")
        low = {site: rank for site, rank in ranks.items() if rank < 0}
        if low:
            raise RankError(f"costs: expected ranks of 0 or more, got {low}")
