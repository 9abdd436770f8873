"""Examples on disk, for which memory takes a few bytes each."""

from __future__ import annotations

import json
from array import array

from polyrank.data.sequences import Lazy
from polyrank.data.spool import Spool
from polyrank.data.types import Example

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ExampleStore(Lazy[Example]):
    """A sequence of examples that grows at its end; one is read from disk whenever it is asked for.

    What comes back equals what was put in. Raises ResourceError if the disk is full.
    """

    def __init__(self) -> None:
        self._spool = Spool()
        self._ends = array("Q", [0])

    def append(self, example: Example) -> None:
        """Add an example."""
        texts = [example.prompt, example.input, *example.references]
        # Columns often are those very texts: then only which one is written.
        columns = [
            [name, texts.index(value) if value in texts else value]
            for name, value in example.columns.items()
        ]
        line = _encode([example.row, texts, columns]).encode("utf-8", "surrogatepass")
        self._ends.append(self._spool.append(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, index: int) -> Example:
        """Read one example."""
        line = self._spool.read(self._ends[index], self._ends[index + 1])
        row, texts, columns = json.loads(line.decode("utf-8", "surrogatepass"))
        return Example(
            prompt=texts[0],
            references=tuple(texts[2:]),
            row=row,
            columns={name: texts[at] if isinstance(at, int) else at for name, at in columns},
            input=texts[1],
        )
