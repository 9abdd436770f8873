"""The records of data, from a source's row to a batch of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyrank.data.sequences import joined

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One prompt with its completion, before any template.

    `prompt` is what is asked and `input` what it is asked about (often empty); the template of
    `encode` puts both in their place. `references` are the acceptable completions: training uses
    the first, text metrics the best of all. `row` is the number of the row in its source (from 0),
    so that a message can name it. `columns` keeps the source's scalar columns as text, such as
    ``task`` or ``category``, which partitioning and reports may ask for.
    """

    prompt: str
    references: tuple[str, ...]
    row: int
    columns: Mapping[str, str] = field(default_factory=dict)
    input: str = ""


@dataclass(frozen=True)
class Skipped:
    """Rows that were not used, by reason (``too long``, ``empty prompt``, ``no completion``, …).

    Every row is named by its number in the source (``row 12``), after a label where one was given
    (``task042 row 12``). Adding two keeps the order in which reasons and rows came.
    """

    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rows were skipped for any reason."""
        return sum(len(rows) for rows in self.rows.values())

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped.of([self, other])

    @staticmethod
    def of(parts: Iterable[Skipped]) -> Skipped:
        """Return the sum of all parts, in time that grows with their rows alone."""
        rows: dict[str, list[str]] = {}
        for part in parts:
            for reason, named in part.rows.items():
                rows.setdefault(reason, []).extend(named)
        return Skipped(rows)

    def __str__(self) -> str:
        """Say how many and which: ``2 too long (row 4, row 7); 1 no completion (row 9)``."""
        return "; ".join(
            f"{len(rows)} {reason} ({', '.join(rows[:5])}{', …' if len(rows) > 5 else ''})"
            for reason, rows in self.rows.items()
        )


@dataclass(frozen=True)
class Tasks:
    """All usable examples of one source, in its order, and what of it could not be used.

    `examples` may be a tuple or lie on disk (`polyrank.data.store`), and is read as it is used.
    """

    examples: Sequence[Example]
    skipped: Skipped = field(default_factory=Skipped)
    source: str = ""


@dataclass(frozen=True)
class ClientData:
    """One client's examples, split for good at the start of a run; `seen` clients take part.

    The parts may be tuples, or views of examples that lie on disk.
    """

    id: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    category: str = ""
    seen: bool = True

    @property
    def examples(self) -> Sequence[Example]:
        """The three parts together: what a client that never trains can be tested on."""
        return joined(self.train, self.validation, self.test)


@dataclass(frozen=True)
class Encoded:
    """An example as token ids: prompt, completion and end of sequence.

    The loss is taken on the tokens from position `loss_from` on (0 < loss_from < len): each is
    predicted from the ones before it. `prompt_length` tokens are the prompt (what generation is
    given). `example` is the index of the example in the sequence that was encoded, `cut` the number
    of prompt tokens left out to fit.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    loss_from: int
    example: int
    cut: int = 0

    @property
    def targets(self) -> int:
        """The number of tokens that carry loss."""
        return len(self.input_ids) - self.loss_from


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of unequal length in one rectangle, padded on the right.

    `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (the token itself where
    it carries loss, -100 elsewhere; not shifted) are int64 of N×T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        """The number of tokens that carry loss."""
        return int((self.labels != -100).sum())
