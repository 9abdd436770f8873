"""Rows from a source: a file, a folder, or a data set of a hub.

JSON, CSV and text files are read by `text_rows`, everything else through `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from polyrank.data import datasets_rows, text_rows
from polyrank.data.text_rows import Read, Row
from polyrank.errors import DataError, RecipeError

SUFFIXES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a folder or a hub id, and which part of it.

    `format` is ``auto``, ``json`` (lines or one list), ``csv``, ``tsv``, ``text``, ``parquet``,
    ``folder`` or ``hub``. `split` names a split such as ``train``; `subset` and `revision` are a
    hub's configuration and version; `separator` divides a line of text into input and output.
    """

    name: str
    format: str = "auto"
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    separator: str | None = None

    def rows(self) -> Iterable[Row]:
        """Return the rows in order, read anew in every iteration and never all held.

        Raises DataError if the source is missing, and while iterating if it cannot be read or is
        empty.
        """
        kind = _kind(self)
        used = {"separator": ["text"], "subset": ["folder", "hub"], "revision": ["hub"]}
        given = {"separator": self.separator, "subset": self.subset, "revision": self.revision}
        for setting, kinds in used.items():
            if given[setting] is not None and kind not in kinds:
                raise RecipeError(
                    f"{self.name}: {setting} is for {' and '.join(kinds)} sources, this one is "
                    f"{kind}; leave it out"
                )
        if self.separator == "":
            raise RecipeError(f"{self.name}: expected a separator of at least one character")
        if kind not in READERS:
            raise RecipeError(
                f"data format: expected auto or one of {', '.join(READERS)}, got {self.format!r}"
            )
        path = Path(self.name).expanduser()
        if kind != "hub":
            if not path.exists():
                raise _missing(self.name)
            if path.is_dir() != (kind == "folder"):
                raise DataError(
                    f"{self.name}: expected a {'folder' if kind == 'folder' else f'{kind} file'}, "
                    f"got a {'folder' if path.is_dir() else 'file'}"
                )
        if self.split not in (None, "train") and kind in LINES:
            raise DataError(
                f"{self.name}: a {kind} file is one split, so split={self.split!r} is not in it; "
                "name the file of that split"
            )
        return _Rows(self.name, READERS[kind](self, path))


@dataclass(frozen=True)
class _Rows(Iterable[Row]):
    """What a reader yields, as often as it is iterated over; DataError if that is nothing."""

    name: str
    read: Read

    def __iter__(self) -> Iterator[Row]:
        empty = True
        for row in self.read():
            empty = False
            yield row
        if empty:
            raise DataError(f"{self.name}: the source is empty, it has no rows")


def _kind(source: Source) -> str:
    """Return the reader's name that `auto` stands for."""
    if source.format != "auto":
        return source.format
    path = Path(source.name).expanduser()
    if path.is_dir():
        return "folder"
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if path.exists():
        raise DataError(
            f"{source.name}: the name does not tell the format; expected it to end in "
            f"{', '.join(SUFFIXES)} (and .gz), or set the format"
        )
    local = path.is_absolute() or source.name.startswith((".", "~"))
    if local or path.suffix == ".gz" or source.name.count("/") > 1:
        raise _missing(source.name)
    return "hub"


def _missing(name: str) -> DataError:
    return DataError(
        f"{name}: there is no such file or folder; name that of your own data, which a recipe has "
        "as data.source"
    )


def _json(source: Source, path: Path) -> Read:
    return partial(text_rows.json_rows, source.name, text_rows.lines_of(source.name, path))


def _csv(source: Source, path: Path, delimiter: str = ",") -> Read:
    lines = text_rows.lines_of(source.name, path)
    return partial(text_rows.csv_rows, source.name, lines, delimiter)


def _tsv(source: Source, path: Path) -> Read:
    return _csv(source, path, "\t")


def _lines(source: Source, path: Path) -> Read:
    return partial(
        text_rows.separated_rows, text_rows.lines_of(source.name, path), source.separator
    )


def _parquet(source: Source, path: Path) -> Read:
    return datasets_rows.parquet(source.name, path, source.split)


def _folder(source: Source, path: Path) -> Read:
    return datasets_rows.folder(source.name, path, source.split, source.subset)


def _hub(source: Source, _path: Path) -> Read:
    return datasets_rows.hub(source.name, source.split, source.subset, source.revision)


LINES = ("json", "csv", "tsv", "text")
READERS: dict[str, Callable[[Source, Path], Read]] = {
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "text": _lines,
    "parquet": _parquet,
    "folder": _folder,
    "hub": _hub,
}
