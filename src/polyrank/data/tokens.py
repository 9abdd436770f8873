"""Encoded examples on disk, with their sizes in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

from polyrank.data.sequences import Joined, Lazy, View
from polyrank.data.spool import Spool
from polyrank.data.types import Encoded
from polyrank.errors import DataError


class Size(NamedTuple):
    """How long an encoded example is: all its tokens, the prompt's, and those that carry loss."""

    tokens: int
    prompt: int
    targets: int


class TokenStore:
    """Encoded examples in a temporary file: 4 bytes a token there, 16 a row in memory."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._ends = array("Q", [0])
        self._prompts = array("I")
        self._losses = array("I")

    def extend(self, rows: Iterable[Encoded]) -> EncodedRows:
        """Write rows as they come, and return them as a sequence."""
        first = len(self._prompts)
        for row in rows:
            record = array("i", (row.example, row.cut, *row.input_ids))
            self._ends.append(self._spool.append(record.tobytes()))
            self._prompts.append(row.prompt_length)
            self._losses.append(row.loss_from)
        return EncodedRows(self, range(first, len(self._prompts)))

    def read(self, number: int) -> Encoded:
        """Read one row."""
        record = array("i")
        record.frombytes(self._spool.read(self._ends[number], self._ends[number + 1]))
        example, cut, *ids = record
        return Encoded(tuple(ids), self._prompts[number], self._losses[number], example, cut)

    def size(self, number: int) -> Size:
        """Return a row's size without reading it."""
        tokens = (self._ends[number + 1] - self._ends[number]) // 4 - 2
        return Size(tokens, self._prompts[number], tokens - self._losses[number])


class EncodedRows(Lazy[Encoded]):
    """Rows of a store that lie one after the other, such as one part of a client's data."""

    def __init__(self, store: TokenStore, numbers: range):
        self._store, self._numbers = store, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, index: int) -> Encoded:
        """Read one row."""
        return self._store.read(self._numbers[index])

    def part(self, places: Sequence[int]) -> Sequence[Encoded]:
        """Return some of the rows."""
        if isinstance(places, range) and places.step == 1:
            return EncodedRows(self._store, self._numbers[places.start : places.stop])
        return View(self, places)

    def sizes(self) -> Iterator[Size]:
        """Yield the rows' sizes without reading them."""
        return map(self._store.size, self._numbers)


class RowsElsewhere(Lazy[Encoded]):
    """Rows that another machine keeps: known are their number and the largest sizes among them.

    Every row counts as large as the largest. Reading one raises DataError.
    """

    def __init__(self, owner: str, count: int, tokens: int, targets: int):
        self._owner, self._count = owner, count
        self._largest = Size(tokens, tokens - targets, targets)

    def __len__(self) -> int:
        return self._count

    def item(self, index: int) -> Encoded:  # noqa: ARG002
        """Raise DataError."""
        raise DataError(f"client {self._owner!r}: its examples are not on this machine")

    def part(self, places: Sequence[int]) -> RowsElsewhere:
        """Return as many of them as there are places."""
        tokens, _, targets = self._largest
        return RowsElsewhere(self._owner, len(places), tokens, targets)

    def sizes(self) -> Iterator[Size]:
        """Yield the largest size for every row."""
        return repeat(self._largest, self._count)


def sizes(rows: Sequence[Encoded]) -> Iterator[Size]:
    """Yield the sizes of encoded examples, without reading those that lie in a store."""
    if isinstance(rows, EncodedRows | RowsElsewhere):
        yield from rows.sizes()
    elif isinstance(rows, Joined):
        for part in rows.parts:
            yield from sizes(part)
    else:
        for row in rows:
            yield Size(len(row.input_ids), row.prompt_length, row.targets)
