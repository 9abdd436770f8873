"""Traces: files that say which type a client has from which round on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyrank.errors import RecipeError

COLUMNS = ("round", "client", "type")


def read_trace(source: str) -> dict[int, dict[str, str]]:
    """Return round -> client -> type from a CSV file with a header, or from JSON lines.

    Raises RecipeError, naming file and line, for a file that cannot be read, a missing column, a
    round that is no whole number of at least 1, and a client that a round names twice.
    """
    path = Path(source).expanduser()
    changes: dict[int, dict[str, str]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"fleet.trace: {path} cannot be read: {error}") from error
    for line, row in _rows(path, text):
        place = f"fleet.trace: {path}, line {line}"
        missing = [name for name in COLUMNS if row.get(name) in (None, "")]
        if missing:
            raise RecipeError(f"{place}: expected {', '.join(COLUMNS)}; {missing} missing")
        try:
            number = int(str(row["round"]))
        except ValueError:
            number = 0
        if number < 1:
            raise RecipeError(f"{place}: expected a round from 1 on, got {row['round']!r}")
        named = changes.setdefault(number, {})
        client = str(row["client"])
        if client in named:
            raise RecipeError(f"{place}: round {number} names client {client!r} twice")
        named[client] = str(row["type"])
    if not changes:
        raise RecipeError(f"fleet.trace: {path} holds no change")
    return changes


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield reader.line_num, row
        return
    for line, entry in enumerate(text.split("\n"), start=1):
        if not entry.strip():
            continue
        try:
            row = json.loads(entry)
        except ValueError as error:
            raise RecipeError(f"fleet.trace: {path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RecipeError(f"fleet.trace: {path}, line {line}: expected an object, got {entry}")
        yield line, row
