"""Sequences that name items of others instead of holding them."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar, overload

T = TypeVar("T", covariant=True)
S = TypeVar("S")


class Lazy(Sequence[T]):
    """A sequence that makes its items when asked; a slice is a view, and equality is by item."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Return the item at `index`, which is within 0 … len − 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return self.part(range(len(self))[index])
        return self.item(range(len(self))[index])  # Also checks it, and takes negative ones.

    def __iter__(self) -> Iterator[T]:
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lazy | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(
            own == its for own, its in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} items>"

    def part(self, places: Sequence[int]) -> Sequence[T]:
        """Return the items at these places, which are within 0 … len − 1."""
        return View(self, places)


class View(Lazy[T]):
    """Some items of another sequence, in an order of its own."""

    def __init__(self, base: Sequence[T], places: Iterable[int]):
        self._base = base
        self._places = places if isinstance(places, range) else array("Q", places)

    def __len__(self) -> int:
        return len(self._places)

    def item(self, index: int) -> T:
        """Return the item at `index`."""
        return self._base[self._places[index]]

    def part(self, places: Sequence[int]) -> Sequence[T]:
        """Return a view of the same base."""
        return View(self._base, (self._places[place] for place in places))


class Joined(Lazy[T]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Iterable[Sequence[T]]):
        self.parts = tuple(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            yield from part

    def item(self, index: int) -> T:
        """Return the item at `index`."""
        number = bisect_right(self._ends, index)
        return self.parts[number][index - (self._ends[number - 1] if number else 0)]


def select(items: Sequence[S], places: Sequence[int]) -> Sequence[S]:
    """Return the items at these places: a view of what is lazy, otherwise a tuple."""
    if isinstance(items, Lazy):
        return items.part(places)
    return tuple(items[place] for place in places)


def joined(*parts: Sequence[S]) -> Sequence[S]:
    """Return the items of all parts in turn; a tuple if none of the parts is lazy."""
    filled = [part for part in parts if len(part)]
    if any(isinstance(part, Lazy) for part in filled):
        return filled[0] if len(filled) == 1 else Joined(filled)
    return tuple(item for part in filled for item in part)
