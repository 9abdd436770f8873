"""Routing: the slots that a batch's rows belong to, and blocks of rows per slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.errors import SiteError


@dataclass(frozen=True)
class Share:
    """Rows of one of several clients that train a slot together: their dropout has its seed."""

    rows: int
    length: int
    seed: int


@dataclass(frozen=True)
class Part:
    """One slot's rows in a batch: how many, and the length of the longest in tokens.

    `draw` is (optimizer step, microbatch) where dropout is wanted, None where it is not. With
    `scored` the pass counts for the importance of the sites to this slot. `shares` say whose rows
    they are, one after the other, if not all of the slot's own client.
    """

    slot: int
    rows: int
    length: int
    draw: tuple[int, int] | None = None
    scored: bool = False
    shares: tuple[Share, ...] = ()

    def shared(self, seed: int) -> tuple[Share, ...]:
        """Return whose rows these are, `seed` being that of the slot."""
        return self.shares or (Share(self.rows, self.length, seed),)


class Routing:
    """The parts of one batch of B×T tokens, row blocks in the order given.

    Slots that are not named have no rows and stay out of the computation. Where the parts have
    unequal numbers of rows, the shorter blocks are filled with repeated rows whose results are not
    read, so their gradients are exactly zero.
    """

    def __init__(self, parts: Sequence[Part], slots: int, device: torch.device):
        named = [part.slot for part in parts]
        if not parts or len(set(named)) < len(named) or not set(named) <= set(range(slots)):
            raise SiteError(
                f"Cohort.route: expected each of some slots in 0…{slots - 1} once, got {named}"
            )
        if any(part.rows < 1 or part.length < 1 for part in parts):
            raise SiteError(f"Cohort.route: a part without rows or tokens in {list(parts)}")
        self.parts = tuple(parts)
        self.rows = sum(part.rows for part in parts)
        self.length = max(part.length for part in parts)
        self.all_in_order = named == list(range(slots))
        self.index = torch.tensor(named, device=device)
        scored = [part.slot for part in parts if part.scored]
        self.scored = bool(scored)
        self._scored = torch.tensor(scored, dtype=torch.long, device=device)
        tallest = max(part.rows for part in parts)
        self.even = all(part.rows == tallest for part in parts)
        spread, back, first = [], [], 0
        for block, part in enumerate(parts):
            spread += [first + min(row, part.rows - 1) for row in range(tallest)]
            back += [block * tallest + row for row in range(part.rows)]
            first += part.rows
        self._spread = torch.tensor(spread, device=device)
        self._back = torch.tensor(back, device=device)

    def select(self, stack: Tensor) -> Tensor:
        """Return the entries of K×… that belong to the parts, in their order."""
        return stack if self.all_in_order else stack.index_select(0, self.index)

    def rows_of(self, x: Tensor, site: str) -> Tensor:
        """Return a site's input as B×T×n; SiteError if it does not hold exactly the batch."""
        batch = (self.rows, self.length)
        if tuple(x.shape[:-1]) not in (batch, (self.rows * self.length,)):
            raise SiteError(
                f"Cohort: {site} was called with {tuple(x.shape[:-1])} rows, the batch has "
                f"{batch}. A module that sees only some tokens (an expert of a mixture) cannot be "
                "a site of a cohort: exclude it"
            )
        return x.reshape(*batch, x.shape[-1])

    def scored_sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots that are scored, and per slot the sums of its tokens' m values each."""
        by_row = values.reshape(self.rows, -1, values.shape[-1])
        rows = [part.rows for part in self.parts]
        sums = [
            block.sum(dim=(0, 1))
            for part, block in zip(self.parts, by_row.split(rows), strict=True)
            if part.scored
        ]
        return self._scored, torch.stack(sums)

    def blocks(self, x: Tensor) -> Tensor:
        """Return B×T×n as one block per part, parts×(rows·T)×n."""
        if not self.even:
            x = x.index_select(0, self._spread)
        return x.reshape(len(self.parts), -1, x.shape[-1])

    def unblock(self, y: Tensor) -> Tensor:
        """Return parts×(rows·T)×m as B×T×m; the inverse of `blocks`."""
        rows = y.reshape(-1, self.length, y.shape[-1])
        return rows if self.even else rows.index_select(0, self._back)
