"""Rows of JSON, CSV and plain text files, line by line and without guessing types.

Readers that infer a schema turn ``"2020-01-01"`` into a timestamp, ``"None"`` into a missing value
and ``"01"`` into a number, all of which are answers that a task may ask for.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from polyrank.errors import DataError

Row = Mapping[str, Any]
Read = Callable[[], Iterator[Row]]
"""Reads a source from its beginning; may be called again."""
Lines = Callable[[], Iterator[str]]


def lines_of(name: str, path: Path) -> Lines:
    """Return what reads a file's lines, with their ends, as UTF-8; a BOM is left out.

    A file that begins as gzip does is unpacked on the way, whatever its name. Lines end at a line
    feed alone, since JSON strings may hold U+2028 and its like as they are.
    """
    begin = _beginner(name, path)

    def read() -> Iterator[str]:
        with begin() as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed and path.suffix == ".gz" and file.read(1):
                raise DataError(f"{name}: named .gz, but not a gzip file")
            lines = gzip.open(file) if packed else file  # noqa: SIM115 - closed with the file
            number = 0
            try:
                for number, line in enumerate(lines, start=1):
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, line {number}: expected UTF-8, got the byte "
                    f"0x{error.object[error.start]:02x}; convert the file"
                ) from error
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(
                    f"{name}: the gzip stream is broken ({error})"
                    if packed
                    else f"{name}: cannot be read: {error}"
                ) from error

    return read


def _beginner(name: str, path: Path) -> Callable[[], BinaryIO]:
    """Return what opens the file at its beginning; a pipe, which has but one, is read at once."""
    try:
        if path.is_file():
            return lambda: _open(name, path)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    return lambda: io.BytesIO(content)


def _open(name: str, path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def json_rows(name: str, lines: Lines) -> Iterator[Row]:
    """Yield the objects of JSON lines, or of one list, which is read whole."""
    numbered = enumerate(lines(), start=1)
    first = next((pair for pair in numbered if pair[1].strip()), None)
    if first is None:
        return
    start, line = first
    if line.lstrip().startswith("["):
        values = _parsed(name, line + "".join(rest for _, rest in numbered), start)
        for number, value in enumerate(values, start=1):
            yield _object(name, f"item {number}", value)
        return
    for number, line in itertools.chain([first], numbered):
        if line.strip():
            yield _object(name, f"line {number}", _parsed(name, line.rstrip("\n"), number))


def _parsed(name: str, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}, line {line + error.lineno - 1}: not valid JSON ({error.msg} at column "
            f"{error.colno}); expected one object per line, or one list of objects"
        ) from error
    except (RecursionError, ValueError) as error:  # Nested, or with a number, beyond all measure.
        raise DataError(f"{name}, line {line}: not readable as JSON ({error})") from error


def _object(name: str, place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{name}, {place}: expected a JSON object with the columns as keys, got "
            f"{type(value).__name__}"
        )
    return value


def csv_rows(name: str, lines: Lines, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns; every cell is text."""
    csv.field_size_limit(1 << 30)
    # A line may also end at a carriage return alone.
    parts = itertools.chain.from_iterable(io.StringIO(line, newline="") for line in lines())
    reader = csv.reader(parts, delimiter=delimiter, strict=True)
    try:
        header = next((fields for fields in reader if fields), [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise DataError(f"{name}: two columns are called {twice[0]!r}; rename one of them")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name}, line {reader.line_num}: expected {len(header)} fields "
                    f"({', '.join(header)}), got {len(fields)}; quote fields that hold "
                    f"{delimiter!r}"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not valid CSV ({error})") from error


def separated_rows(lines: Lines, separator: str | None) -> Iterator[Row]:
    """Yield each line that is not blank as ``text``, or divided into ``input`` and ``output``."""
    for line in lines():
        text = line.rstrip("\n").rstrip("\r")
        if not text.strip():
            continue
        if separator is None:
            yield {"text": text}
        else:
            before, _, after = text.partition(separator)
            yield {"input": before.strip(), "output": after.strip()}
