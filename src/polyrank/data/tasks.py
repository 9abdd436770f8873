"""Tasks: the rows of a source as prompts and completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.data.formats import fill, parse
from polyrank.data.sources import Row, Source
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
    rows = Source(name, format, split, subset, revision, separator).rows()
    if limit is not None:
        if limit < 1:
            raise RecipeError(f"data limit: expected at least 1 row, got {limit}")
        rows = rows[:limit]
    return tasks_from_rows(rows, prompt=prompt, input=input, completion=completion, source=name)


def tasks_from_rows(
    rows: Iterable[Row],
    *,
    prompt: str | None = None,
    input: str | None = None,
    completion: str = "output",
    source: str = "rows",
) -> Tasks:
    """Return the examples of rows in memory; columns are chosen as in `load_tasks`."""
    listed = list(rows)
    if not listed:
        raise DataError(f"{source}: not one usable example, it has no rows")
    columns = list(dict.fromkeys(column for row in listed for column in row))
    if prompt is None:
        prompt = "instruction" if "instruction" in columns else "input"
        if input is None and prompt == "instruction" and "input" in columns:
            input = "input"
    ask = _field(prompt, columns, source)
    about = _field(input, columns, source) if input is not None else None
    answer = _field(completion, columns, source)

    shared: dict[str, str] = {}  # instructions and task names repeat: keep one copy of each
    examples: list[Example] = []
    skipped: dict[str, list[str]] = {}
    for number, row in enumerate(listed):
        place = f"{source}, row {number}"
        texts = [ask(row, place), about(row, place) if about else []]
        question, context = (shared.setdefault(t, t) for t in (_only(x, place) for x in texts))
        references = tuple(text for text in answer(row, place) if text.strip())
        if not question.strip() and not context.strip():
            skipped.setdefault(EMPTY_PROMPT, []).append(f"row {number}")
        elif not references:
            skipped.setdefault(NO_COMPLETION, []).append(f"row {number}")
        else:
            kept = {
                column: shared.setdefault(text, text)
                for column, value in row.items()
                if (text := _scalar(value)) is not None
            }
            if not _encodable([question, context, *references, *kept.values()]):
                skipped.setdefault(BROKEN, []).append(f"row {number}")
                continue
            examples.append(Example(question, references, number, kept, context))
    result = Tasks(tuple(examples), Skipped(skipped), source)
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
