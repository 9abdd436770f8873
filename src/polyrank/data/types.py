"""The records that data is made of, from a source's row to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One prompt with its completion.

    `prompt` is the text after templating, `references` are the acceptable completions: training
    uses the first, text metrics the best of all. `row` is the number of the row in its source
    (from 0), so that a message can name it. `columns` keeps the source's columns that partitioning
    or reports may ask for, such as ``task`` or ``category``.
    """

    prompt: str
    references: tuple[str, ...]
    row: int
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientData:
    """One client's examples, split for good at the start of a run; `seen` clients take part."""

    id: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    category: str = ""
    seen: bool = True


@dataclass(frozen=True)
class Encoded:
    """An example as token ids: prompt, completion and end of sequence.

    The loss is taken on the tokens from position `loss_from` on (0 < loss_from < len): each is
    predicted from the ones before it. `prompt_length` tokens are the prompt (what generation is
    given). `example` is the index of the example in the sequence that was encoded.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    loss_from: int
    example: int

    @property
    def targets(self) -> int:
        """The number of tokens that carry loss."""
        return len(self.input_ids) - self.loss_from


@dataclass(frozen=True)
class Skipped:
    """Rows that were not used, by reason (``too long``, ``empty prompt``, ``no completion``, …).

    Every row is named by its number in the source, or by client and row.
    """

    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rows were skipped for any reason."""
        return sum(len(rows) for rows in self.rows.values())

    def __add__(self, other: Skipped) -> Skipped:
        reasons = {*self.rows, *other.rows}
        return Skipped({r: [*self.rows.get(r, ()), *other.rows.get(r, ())] for r in reasons})
