"""Rows from a source: a file, a folder, or a data set of a hub.

JSON, CSV and text files are read here, line by line and without guessing types: readers that infer
a schema turn ``"2020-01-01"`` into a timestamp, ``"None"`` into a missing value and ``"01"`` into a
number, all of which are answers that a task may ask for. Everything else goes through `datasets`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.data.extras import need
from polyrank.errors import DataError, RecipeError

Row = Mapping[str, Any]

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

    def rows(self) -> list[Row]:
        """Return the rows in order; DataError if the source is missing or cannot be read."""
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
                raise DataError(f"{self.name}: there is no such file or folder")
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
        rows = READERS[kind](self, path)
        if not rows:
            raise DataError(f"{self.name}: the source is empty, it has no rows")
        return rows


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
        raise DataError(f"{source.name}: there is no such file or folder")
    return "hub"


def _text(source: Source, path: Path) -> str:
    """Return the file's text, unpacked if it is gzipped, whatever its name; a BOM is left out."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror}") from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{source.name}: the gzip stream is broken ({error})") from error
    elif path.suffix == ".gz" and raw:
        raise DataError(f"{source.name}: named .gz, but not a gzip file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source.name}, line {line}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; "
            "convert the file"
        ) from error


def _json(source: Source, path: Path) -> list[Row]:
    text = _text(source, path)
    if text.lstrip().startswith("["):
        try:
            values = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise _broken_json(source, error.lineno, error) from error
        place = "item"
    else:
        values = list(_json_lines(source, text))
        place = "line"
    for number, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f"{source.name}, {place} {number}: expected a JSON object with the columns as "
                f"keys, got {type(value).__name__}"
            )
    return [value for _, value in values]


def _json_lines(source: Source, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _broken_json(source, number, error) from error


def _broken_json(source: Source, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(
        f"{source.name}, line {line}: not valid JSON ({error.msg} at column {error.colno}); "
        "expected one object per line, or one list of objects"
    )


def _csv(source: Source, path: Path, delimiter: str = ",") -> list[Row]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        io.StringIO(_text(source, path), newline=""), delimiter=delimiter, strict=True
    )
    rows: list[Row] = []
    try:
        header = next(reader, [])
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{source.name}, line {reader.line_num}: expected {len(header)} fields "
                    f"({', '.join(header)}), got {len(fields)}; quote fields that hold "
                    f"{delimiter!r}"
                )
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{source.name}, line {reader.line_num}: not valid CSV ({error})"
        ) from error
    return rows


def _tsv(source: Source, path: Path) -> list[Row]:
    return _csv(source, path, "\t")


def _lines(source: Source, path: Path) -> list[Row]:
    lines = [line.rstrip("\r") for line in _text(source, path).split("\n")]
    lines = [line for line in lines if line.strip()]
    if source.separator is None:
        return [{"text": line} for line in lines]
    parts = [line.partition(source.separator) for line in lines]
    return [{"input": before.strip(), "output": after.strip()} for before, _, after in parts]


def _parquet(source: Source, path: Path) -> list[Row]:
    files = glob.escape(str(path.resolve()))
    return _load(source, lambda load, cache: load("parquet", data_files=files, **cache))


def _folder(source: Source, path: Path) -> list[Row]:
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if saved:
        datasets = need("datasets")
        return _load(source, lambda _load, _cache: datasets.load_from_disk(str(path)))
    folder = str(path.resolve())
    return _load(source, lambda load, cache: load(folder, name=source.subset, **cache))


def _hub(source: Source, _path: Path) -> list[Row]:
    return _load(
        source,
        lambda load, _cache: load(
            source.name, name=source.subset, split=source.split, revision=source.revision
        ),
    )


LINES = ("json", "csv", "tsv", "text")
READERS: dict[str, Callable[[Source, Path], list[Row]]] = {
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "text": _lines,
    "parquet": _parquet,
    "folder": _folder,
    "hub": _hub,
}


def _load(source: Source, call: Callable[[Callable[..., Any], dict[str, Any]], Any]) -> list[Row]:
    """Return the rows that a call of `datasets` gives, of one split, classes by their names.

    Local data is read into memory through a cache that is thrown away, so a changed file is seen.
    """
    datasets = need("datasets")
    with tempfile.TemporaryDirectory(prefix="polyrank-") as folder, _quiet(datasets):
        try:
            data = call(datasets.load_dataset, {"cache_dir": folder, "keep_in_memory": True})
            if isinstance(data, datasets.DatasetDict):
                data = _one_split(source, data)
            columns = {name: data[name][:] for name in data.column_names}
            for name, feature in data.features.items():
                if isinstance(feature, datasets.ClassLabel):
                    columns[name] = [
                        None if i is None or i < 0 else feature.int2str(i) for i in columns[name]
                    ]
        except DataError:
            raise
        except Exception as error:  # whatever datasets, pyarrow, fsspec or the hub's client raise
            cause = error.__cause__ or error
            hint = (
                "; it is no file or folder here either, so check the name or the network"
                if _kind(source) == "hub"
                else ""
            )
            first = (str(cause) or type(cause).__name__).strip().splitlines()[0]
            raise DataError(f"{source.name}: cannot be loaded: {first}{hint}") from error
    cells = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in cells]


def _one_split(source: Source, data: Any) -> Any:
    """Return the split that was asked for, or the only one."""
    if source.split is None and len(data) == 1:
        return next(iter(data.values()))
    if source.split in data:
        return data[source.split]
    raise DataError(
        f"{source.name}: expected split to be one of {', '.join(data)}, got {source.split!r}"
    )


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep progress bars and log lines of `datasets` off the terminal; errors are raised anyway."""
    log = datasets.utils.logging
    shown, level = not datasets.are_progress_bars_disabled(), log.get_verbosity()
    datasets.disable_progress_bars()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
