"""Limits that the owner of a device sets and that its plans respect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Annotated

from annotated_types import Ge

from polyrank.planning.cut import CutPoint
from polyrank.settings import check


@dataclass(frozen=True)
class Limits:
    """The limits of one device; the defaults are none."""

    largest_rank: Annotated[int, Ge(1)] | None = None
    """The largest LoRA rank that it trains; left out, any."""
    lowest_cut: Annotated[int, Ge(1)] | None = None
    """In split training, the fewest blocks that it runs itself: the deeper the cut, the less the
    activations that it sends tell; left out, any."""
    labels_may_leave: bool = True
    """Whether a split client's labels may go to the server; false: only a U-shaped cut, which keeps
    them here."""

    def __post_init__(self) -> None:
        check(self, "limits")

    @staticmethod
    def of_all(limits: Sequence[Limits]) -> Limits:
        """Return the tightest combination: a plan within it is within each of `limits`."""
        ranks = [limit.largest_rank for limit in limits if limit.largest_rank is not None]
        cuts = [limit.lowest_cut for limit in limits if limit.lowest_cut is not None]
        return Limits(
            min(ranks, default=None),
            max(cuts, default=None),
            all(limit.labels_may_leave for limit in limits),
        )

    def rank(self, most: int) -> int:
        """Return the largest rank where without limits it is `most`."""
        return most if self.largest_rank is None else min(most, self.largest_rank)

    def cuts(self, cuts: Sequence[CutPoint], blocks: int) -> list[CutPoint]:
        """Return the cuts that these limits allow, as U-shapes where labels may not leave."""
        allowed = [cut for cut in cuts if cut.lower >= (self.lowest_cut or 1)]
        if self.labels_may_leave:
            return allowed
        last = blocks - 1
        return [replace(cut, upper=cut.upper or last) for cut in allowed if cut.lower < last]

    def looser(self) -> Iterator[Limits]:
        """Yield these limits with one of them lifted, then with two, up to all that are set."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for count in range(1, len(given) + 1):
            for lifted in combinations(given, count):
                remaining = {name: getattr(self, name) for name in given if name not in lifted}
                yield Limits(**remaining)


NONE = Limits()
