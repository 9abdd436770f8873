"""Tasks: the rows of a source as prompts and completions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.data.formats import fill, parse
from polyrank.data.sources import Source
from polyrank.data.store import ExampleStore
from polyrank.data.text_rows import Row
from polyrank.data.types import Example, Skipped, Tasks
from polyrank.errors import DataError, RecipeError

EMPTY_PROMPT = "empty prompt"
NO_COMPLETION = "no completion"
BROKEN = "text that is not Unicode"


def load_tasks(
    source: str | Path,
    *,
    prompt: str | None = None,
    input: str | None = None,
    completion: str = "output",
    format: str = "auto",
    separator: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Tasks:
    """Return the examples of a file, a folder or a hub's data set.

    `source` is a path (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, also gzipped;
    ``.parquet``; a folder that `datasets` wrote or can read) or a hub id such as ``owner/name``.
    `prompt`, `input` and `completion` each name a column or are a format string over columns
    (``"Describe: {meaning}"``). Without `prompt` the columns are ``instruction`` and, where there
    is one, ``input``; a source with ``input`` alone has its prompts there. A completion may be a
    list of references. `separator` divides the lines of a text file into ``input`` and ``output``.
    `split`, `subset` and `revision` choose within a folder or hub; `limit` keeps the first rows.

    Rows without prompt or completion are named in `skipped`. Raises DataError if the source is
    missing, unreadable or empty, lacks a column, holds something else than text or numbers in one,
    or has no usable row; RecipeError for a format string or a format that cannot be.
    """
    name = str(source)
    if limit is not None and limit < 1:
        raise RecipeError(f"data limit: expected at least 1 row, got {limit}")
    rows = Source(name, format, split, subset, revision, separator).rows()
    fields = _Fields(prompt, input, completion)
    return _tasks(lambda: itertools.islice(rows, limit), fields, name)


def tasks_from_rows(
    rows: Iterable[Row],
    *,
    prompt: str | None = None,
    input: str | None = None,
    completion: str = "output",
    source: str = "rows",
) -> Tasks:
    """Return the examples of rows; columns are chosen as in `load_tasks`.

    `rows` is iterated over twice; an iterator, which gives its rows but once, is made a list first.
    """
    again = list(rows) if isinstance(rows, Iterator) else rows
    return _tasks(lambda: iter(again), _Fields(prompt, input, completion), source)


@dataclass(frozen=True)
class _Fields:
    """The columns or format strings of prompt, input and completion; see `load_tasks`."""

    prompt: str | None
    input: str | None
    completion: str


def _tasks(read: Callable[[], Iterator[Row]], fields: _Fields, source: str) -> Tasks:
    """Return the examples of the rows that `read` gives: columns first, then the texts.

    The examples go to a temporary file as they come.
    """
    columns = list({column: None for row in read() for column in row})
    if not columns and not any(True for _ in read()):
        raise DataError(f"{source}: not one usable example, it has no rows")
    prompt, input = fields.prompt, fields.input
    if prompt is None:
        prompt = "instruction" if "instruction" in columns else "input"
        if input is None and prompt == "instruction" and "input" in columns:
            input = "input"
    ask = _field(prompt, columns, source)
    about = _field(input, columns, source) if input is not None else None
    answer = _field(fields.completion, columns, source)

    examples = ExampleStore()
    skipped: dict[str, list[str]] = {}
    for number, row in enumerate(read()):
        place = f"{source}, row {number}"
        question = _only(ask(row, place), place)
        context = _only(about(row, place), place) if about else ""
        references = tuple(text for text in answer(row, place) if text.strip())
        if not question.strip() and not context.strip():
            skipped.setdefault(EMPTY_PROMPT, []).append(f"row {number}")
        elif not references:
            skipped.setdefault(NO_COMPLETION, []).append(f"row {number}")
        else:
            texts = {
                column: text
                for column, value in row.items()
                if (text := _scalar(value)) is not None
            }
            if not _encodable([question, context, *references, *texts.values()]):
                skipped.setdefault(BROKEN, []).append(f"row {number}")
                continue
            examples.append(Example(question, references, number, texts, context))
    result = Tasks(examples, Skipped(skipped), source)
    if not examples:
        raise DataError(f"{source}: not one usable example: {result.skipped}")
    return result


def _only(texts: Sequence[str], place: str) -> str:
    if len(texts) > 1:
        raise DataError(f"{place}: expected one text in a prompt, got a list of {len(texts)}")
    return texts[0] if texts else ""


def _field(
    wanted: str, columns: Sequence[str], source: str
) -> Callable[[Mapping[str, Any], str], list[str]]:
    """Return what reads a column, or fills a format string over columns, as a list of texts."""
    if wanted in columns:
        return lambda row, place: _texts(row.get(wanted), wanted, place)
    if "{" not in wanted:
        raise DataError(f"{source}: no column {wanted!r}; the columns are {', '.join(columns)}")
    pieces = parse(wanted)
    if not any(name for _, name in pieces):
        raise RecipeError(f"format string {wanted!r}: it names no column, such as {{input}}")
    missing = [name for _, name in pieces if name is not None and name not in columns]
    if missing:
        raise DataError(
            f"{source}: no column {missing[0]!r}, which {wanted!r} asks for; the columns are "
            f"{', '.join(columns)}"
        )

    def read(row: Mapping[str, Any], place: str) -> list[str]:
        values = {
            name: _only(_texts(row.get(name), name, place), place) for _, name in pieces if name
        }
        return [fill(pieces, values)] if any(value.strip() for value in values.values()) else []

    return read


def _texts(value: Any, column: str, place: str) -> list[str]:
    """Return a cell as texts: one for text or a number, all of a list, none for nothing."""
    if isinstance(value, str):
        return [value]
    if value is None or value != value:  # a float that is not a number is a missing cell
        return []
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            raise DataError(f"{place}: column {column!r} holds a list within a list")
        return [text for item in value for text in _texts(item, column, place)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    raise DataError(
        f"{place}: expected text, a number or a list of them in column {column!r}, got "
        f"{type(value).__name__}; convert it, or choose another column"
    )


def _encodable(texts: Iterable[str]) -> bool:
    """Whether the texts can be written as UTF-8; halves of surrogate pairs cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _scalar(value: Any) -> str | None:
    """Return a scalar cell as text, truth values as ``true`` and ``false``; None for others."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, str | int | float) else None
