"""A model's inside, as planning knows it: parameters, matrix products, what autograd saves.

A model is blocks and an end (final norm, output embedding). Each distinct kind of them is a
`Section`: a small copy of its autograd graph, whose nodes say what they keep and what they
multiply. Which nodes have a backward pass depends on which sites are adapted, so nothing is
assumed about that when the graph is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

ENTRY = -1
"""In place of a node's index: the hidden states that enter the section."""


@dataclass(frozen=True)
class Size:
    """A count that depends on the batch: constant + by_token·T + by_pair·T² + by_target·P.

    T are the tokens of a row and P the target positions of the whole batch. `by_row` multiplies by
    the number of rows.
    """

    constant: float = 0.0
    by_token: float = 0.0
    by_pair: float = 0.0
    by_target: float = 0.0
    by_row: bool = False

    def at(self, rows: int, length: int, targets: int) -> int:
        """Return the count for so many rows, tokens per row, and target positions in all."""
        value = self.constant + (self.by_token + self.by_pair * length) * length
        return max(0, round((value + self.by_target * targets) * (rows if self.by_row else 1)))


@dataclass(frozen=True)
class Storage:
    """Memory that autograd may keep, in bytes; `shared` names what all blocks share."""

    size: Size
    shared: str | None = None


@dataclass(frozen=True)
class Saved:
    """A storage that a node keeps; with `needs`, only for the gradient of that input."""

    storage: int
    needs: int | None = None


@dataclass(frozen=True)
class Node:
    """One step of the backward pass.

    `inputs` are indices of nodes before it, or `ENTRY`; constants are not among them. `product` is
    the forward operations of a matrix product here; its backward takes as many for each input that
    needs a gradient, or `backward` times as many where one kernel does all. `site` is the linear
    module, by its path in the block, whose output this is. `nbytes` are those of its result, and of
    the gradient of that; a node that `passes` gives its inputs this very gradient.
    """

    inputs: tuple[int, ...]
    saved: tuple[Saved, ...] = ()
    product: Size | None = None
    backward: float | None = None
    attention: bool = False
    site: str | None = None
    nbytes: Size = Size()
    passes: bool = False


@dataclass(frozen=True)
class Section:
    """The autograd graph of one block, or of the end; nodes come after their inputs.

    `inputs` gives per linear module the storage of what it is given, `entry` is that of the
    hidden states that enter; they are kept if some node keeps them.
    """

    nodes: tuple[Node, ...]
    storages: tuple[Storage, ...]
    inputs: Mapping[str, int] = field(default_factory=dict)
    entry: int = 0

    def alive(self, entered: bool, adapted: Set[str]) -> tuple[bool, ...]:
        """Return which nodes have a backward pass.

        `entered` says whether the entering hidden states need a gradient, `adapted` names the
        linear modules with factors.
        """
        alive: list[bool] = []
        for node in self.nodes:
            alive.append(
                node.site in adapted or any(self._lives(i, entered, alive) for i in node.inputs)
            )
        return tuple(alive)

    @staticmethod
    def _lives(index: int, entered: bool, alive: list[bool]) -> bool:
        return entered if index == ENTRY else alive[index]

    def saved(self, entered: bool, adapted: Set[str]) -> frozenset[int]:
        """Return the storages that the frozen model's own operations keep."""
        return frozenset[int]().union(*self.saved_by_node(entered, adapted))

    def saved_by_node(self, entered: bool, adapted: Set[str]) -> list[set[int]]:
        """Return the storages that each node keeps; none where nothing goes back through it."""
        alive = list(self.alive(entered, adapted))
        return [
            {
                saved.storage
                for saved in node.saved
                if saved.needs is None or self._lives(node.inputs[saved.needs], entered, alive)
            }
            if any(self._lives(i, entered, alive) for i in node.inputs)
            else set()
            for node in self.nodes
        ]

    def reached(self, entered: bool, adapted: Set[str]) -> frozenset[str]:
        """Return the linear modules whose input needs a gradient."""
        alive = list(self.alive(entered, adapted))
        return frozenset(
            node.site
            for node in self.nodes
            if node.site is not None and any(self._lives(i, entered, alive) for i in node.inputs)
        )


@dataclass(frozen=True)
class Kind:
    """One kind of block: its section for short rows and, from `window` tokens on, for long ones.

    A sliding window needs a mask from its own length on, where shorter rows need none.
    """

    short: Section
    long: Section
    window: int | None = None

    def section(self, length: int) -> Section:
        """Return the section for rows of this length."""
        return self.short if self.window is None or length < self.window else self.long


@dataclass(frozen=True)
class Block:
    """One decoder block: the path of its modules, its parameters, which of the kinds it is."""

    prefix: str
    parameters: int
    kind: int


@dataclass(frozen=True)
class Anatomy:
    """A model as planning sees it; made by `polyrank.model.anatomy.anatomy_of`.

    `first` are the parameters that go with the first block (embeddings), `last` those that go with
    the last (final norm, output embedding), `tied` those among both. `itemsize` is the bytes of a
    number of the base, for which the sections were recorded. `attention` is ``fused`` or ``eager``.
    `logits` are the bytes of a number of the logits.
    """

    architecture: str
    hidden: int
    vocabulary: int
    itemsize: int
    attention: str
    blocks: tuple[Block, ...]
    kinds: tuple[Kind, ...]
    end: Kind
    first: int
    last: int
    tied: int

    def parameters(self, blocks: Set[int]) -> int:
        """Return the parameters that a machine with these blocks holds.

        A tied embedding counts once on each machine that holds one of its ends.
        """
        total = sum(self.blocks[i].parameters for i in blocks)
        has_first, has_last = 0 in blocks, len(self.blocks) - 1 in blocks
        total += self.first * has_first + self.last * has_last
        return total - self.tied * (has_first and has_last)
