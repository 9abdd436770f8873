"""Rows through the `datasets` package: parquet files, folders, and data sets of a hub."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from polyrank.data.extras import need
from polyrank.data.text_rows import Read, Row
from polyrank.errors import DataError


def parquet(name: str, path: Path, split: str | None) -> Read:
    """Return what reads a parquet file."""
    files = glob.escape(str(path.resolve()))
    return partial(
        _streamed, name, split, lambda load, more: load("parquet", data_files=files, **more)
    )


def folder(name: str, path: Path, split: str | None, subset: str | None) -> Read:
    """Return what reads a folder that `datasets` saved, or one of data files that it knows."""
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        datasets = need("datasets")
        return _held(name, split, "", lambda: datasets.load_from_disk(str(path)))
    place = str(path.resolve())
    return partial(_streamed, name, split, lambda load, more: load(place, name=subset, **more))


def hub(name: str, split: str | None, subset: str | None, revision: str | None) -> Read:
    """Return what reads a data set of a hub, through the cache of `datasets`."""
    datasets = need("datasets")
    hint = "; it is no file or folder here either, so check the name or the network"
    return _held(
        name,
        split,
        hint,
        lambda: datasets.load_dataset(name, name=subset, split=split, revision=revision),
    )


def _held(name: str, split: str | None, hint: str, load: Callable[[], Any]) -> Read:
    """Return what reads a data set that is loaded once; its rows stay on disk, mapped."""
    with _told(name, hint):
        data = _one_split(name, split, load())
    return partial(_rows, name, data)


def _streamed(
    name: str, split: str | None, load: Callable[[Callable[..., Any], dict[str, Any]], Any]
) -> Iterator[Row]:
    """Yield the rows of local files as they are read; nothing is cached, so a change is seen."""
    datasets = need("datasets")
    with tempfile.TemporaryDirectory(prefix="polyrank-") as cache:
        with _told(name):
            more = {"cache_dir": cache, "streaming": True}
            data = _one_split(name, split, load(datasets.load_dataset, more))
        yield from _rows(name, data)


def _rows(name: str, data: Any) -> Iterator[Row]:
    """Yield the rows, classes by their names."""
    datasets = need("datasets")
    classes = {
        column: feature
        for column, feature in (data.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows = iter(data)
    while True:
        with _told(name):
            row = next(rows, None)
        if row is None:
            return
        for column, feature in classes.items():
            value = row.get(column)
            row[column] = None if value is None or value < 0 else feature.int2str(value)
        yield row


def _one_split(name: str, split: str | None, data: Any) -> Any:
    """Return the split that was asked for, or the only one."""
    if not isinstance(data, dict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split in data:
        return data[split]
    raise DataError(f"{name}: expected split to be one of {', '.join(data)}, got {split!r}")


@contextmanager
def _told(name: str, hint: str = "") -> Iterator[None]:
    """Turn whatever is raised into a DataError, and keep log lines and progress bars away."""
    with _quiet(need("datasets")):
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # whatever datasets, pyarrow, fsspec or the hub's client raise
            cause = error.__cause__ or error
            first = (str(cause) or type(cause).__name__).strip().splitlines()[0]
            raise DataError(f"{name}: cannot be loaded: {first}{hint}") from error


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
