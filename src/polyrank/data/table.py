"""The columns by which a partition divides tasks, in few bytes an example."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from polyrank.data.types import Tasks
from polyrank.errors import DataError


@dataclass(frozen=True)
class Table:
    """Of every example its row number and, for some columns, which value it has.

    ``codes[column][i]`` is the place of example i's value in ``names[column]``, which is sorted; -1
    where it has none. A column that no example has is in neither.
    """

    rows: Sequence[int]
    codes: dict[str, array[int]]
    names: dict[str, list[str]]
    source: str
    all_columns: tuple[str, ...]

    @staticmethod
    def of(tasks: Tasks, columns: Collection[str]) -> Table:
        """Return the table of the tasks' examples, reading each once."""
        rows = array("q")
        value_codes: dict[str, dict[str, int]] = {column: {} for column in columns}
        codes = {column: array("i") for column in columns}
        known: dict[str, None] = {}
        for example in tasks.examples:
            rows.append(example.row)
            known.update(dict.fromkeys(example.columns))
            for column, values in value_codes.items():
                value = example.columns.get(column)
                code = -1 if value is None else values.setdefault(value, len(values))
                codes[column].append(code)
        names = {column: sorted(values) for column, values in value_codes.items() if values}
        for column, ordered in names.items():
            place = {name: i for i, name in enumerate(ordered)}
            sorted_code = [place[name] for name in value_codes[column]]
            codes[column] = array("i", (sorted_code[c] if c >= 0 else c for c in codes[column]))
        return Table(
            rows, {column: codes[column] for column in names}, names, tasks.source, (*known,)
        )

    def column(self, name: str, purpose: str) -> Sequence[int]:
        """Return a column's codes; DataError if no example has it."""
        if name not in self.codes:
            raise DataError(
                f"{self.source}: no column {name!r} {purpose}; the columns are "
                f"{', '.join(self.all_columns)}"
            )
        return self.codes[name]

    def common(self, name: str, places: Sequence[int]) -> str:
        """Return the value of a column on which these examples agree; otherwise the empty text."""
        if name not in self.codes:
            return ""
        codes = {self.codes[name][place] for place in places}
        code = codes.pop() if len(codes) == 1 else -1
        return self.names[name][code] if code >= 0 else ""
