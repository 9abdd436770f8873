"""Writing a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyrank.errors import AdapterError, FolderExistsError


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its name when the context ends well.

    After an error or a crash there is no `folder`. Files reach the disk before the name does.
    Raises FolderExistsError if `folder` holds something already or is a file, AdapterError if the
    disk refuses.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderExistsError(
            f"{target} holds something already and is never overwritten; choose another folder"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise AdapterError(f"{target} cannot be written: {error}") from error
    try:
        yield work
        mask = _umask()
        work.chmod(0o777 & ~mask)
        for path in work.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes files that only the owner reads.
                _sync(path)
        work.replace(target)
    except OSError as error:
        raise AdapterError(f"{target} cannot be written, nothing of it is kept: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
