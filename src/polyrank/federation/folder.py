"""A run's folder: one owner at a time, nothing overwritten, checkpoints that are whole or absent.

recipe.toml          the resolved recipe (written by the command line)
run.json             versions, threads, cohort size, fingerprints: what must not change
rounds.jsonl         one record a round
base.json            the bare base's evaluation
checkpoints/round-N/ state.safetensors, state.json, best.*, progress.json, manifest.json
updates/             the accepted updates of the round in progress
adapter/             the result, a PEFT folder
evaluation.json, summary.json
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from polyrank.aggregation import State, Update
from polyrank.algebra import LowRank
from polyrank.errors import CheckpointError, FolderExistsError, FolderInUseError, RunError
from polyrank.federation import storage

KEEP = 2
"""Checkpoints kept: the newest, and the one before to fall back to."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything from which a run goes on after round `round` (0: before the first)."""

    round: int
    state: State
    progress: Mapping[str, Any]
    best: State | None = None


class RunFolder:
    """An open run folder, locked against other processes until `close` (or the process's end)."""

    def __init__(self, path: Path, lock: int):
        self.path, self._lock = path, lock
        self.notes: list[str] = []

    @staticmethod
    def create(path: Path) -> RunFolder:
        """Make and lock a new folder; FolderExistsError if there is anything at `path`."""
        with storage.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                raise FolderExistsError(
                    f"{path}: exists already, and a run never overwrites one; choose another "
                    f"--out, or go on with it: polyrank resume {path}"
                ) from None
        return RunFolder.open(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Lock an existing folder; RunError if it is none, FolderInUseError if it is taken."""
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise FolderInUseError(
                f"{path}: process {owner or '?'} works in this folder; wait for it or stop it"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        for part in ("checkpoints", "updates"):
            (path / part).mkdir(exist_ok=True)
        return RunFolder(path, lock)

    @staticmethod
    def peek(path: Path) -> RunFolder:
        """Look into a folder without locking it: to read, also while a run goes on in it."""
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        return RunFolder(path, -1)

    def close(self) -> None:
        """Release the lock; the folder can then be opened again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- records ---

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Add a line to rounds.jsonl and flush it; it counts once its checkpoint is there."""
        path = self.path / "rounds.jsonl"
        with storage.disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Return the records of rounds.jsonl; a last line that was cut off is left out."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def keep_records(self, last: int) -> None:
        """Drop the records of rounds after `last`: their checkpoint was never finished."""
        kept = [record for record in self.records() if record["round"] <= last]
        if [record["round"] for record in kept] != list(range(1, last + 1)):
            raise RunError(
                f"{self.path / 'rounds.jsonl'}: expected the records of rounds 1 to {last}, found "
                f"{[record['round'] for record in kept]}; restore the file from a copy"
            )
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        storage.write_text(self.path / "rounds.jsonl", "".join(lines))

    # --- checkpoints ---

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint beside the others, then let go of those before the last `KEEP`."""
        root = self.path / "checkpoints"
        target = root / f"round-{checkpoint.round:05d}"
        partial = root / f".partial-{checkpoint.round:05d}"
        with storage.disk_errors(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            storage.write_state(partial, "state", checkpoint.state)
            if checkpoint.best is not None:
                storage.write_state(partial, "best", checkpoint.best)
            storage.write_json(partial / "progress.json", dict(checkpoint.progress))
            hashes = {file.name: storage.sha256(file) for file in sorted(partial.iterdir())}
            storage.write_json(partial / "manifest.json", hashes)
            storage.sync(partial)
            partial.rename(target)
            storage.sync(root)
        for _, old in self._checkpoints()[KEEP:]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None if none was ever begun.

        A damaged one is named in `notes`, set aside as ``damaged-…`` by the owner of the lock, and
        the one before it is taken. Raises CheckpointError if there are checkpoints, none whole.
        """
        problems = []
        for number, path in self._checkpoints():
            problem = _damage(path)
            if problem is None:
                best = storage.read_state(path, "best") if (path / "best.json").exists() else None
                progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
                return Checkpoint(number, storage.read_state(path, "state"), progress, best)
            problems.append(f"{path.name}: {problem}")
            self.notes.append(
                f"checkpoint {path.name} is damaged ({problem}); the one before it is used"
            )
            if self._lock >= 0:  # Out of the way of the new one, but kept.
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        if problems:
            raise CheckpointError(
                f"{self.path / 'checkpoints'}: no checkpoint can be read whole "
                f"({'; '.join(problems)}); start the run anew in another folder"
            )
        return None

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """(round, folder) of every finished checkpoint, newest first."""
        paths = (self.path / "checkpoints").glob("round-*")
        return sorted(((int(p.name.removeprefix("round-")), p) for p in paths), reverse=True)

    # --- updates of the round in progress ---

    def update_path(self, round: int, attempt: int, client: str) -> Path:
        """Where an accepted update lies; client names are quoted to be safe in a file's name."""
        name = f"{round:05d}-{attempt}-{quote(client, safe=' ')}"
        if len(name) > 200:  # Most file systems allow 255 bytes with the ending.
            name = f"{name[:130]}-{hashlib.sha256(client.encode()).hexdigest()}"
        return self.path / "updates" / f"{name}.safetensors"

    def save_update(self, update: Update) -> None:
        """Persist an accepted update."""
        path = self.update_path(update.round, update.attempt, update.client)
        storage.write_update(path, update)

    def load_update(self, round: int, attempt: int, client: str) -> Update | None:
        """Return a persisted update, or None if there is none or it is damaged."""
        path = self.update_path(round, attempt, client)
        if not path.exists():
            return None
        try:
            return storage.read_update(path)
        except RunError as error:
            self.notes.append(str(error))
            path.unlink()
            return None

    def factors(self, round: int, attempt: int, client: str, site: str) -> LowRank:
        """Read one site's factors of a persisted update."""
        return storage.read_factors(self.update_path(round, attempt, client), site)

    def clear_updates(self, *, before: int) -> None:
        """Delete the updates of rounds before `before`, and what a kill left half written."""
        for path in (self.path / "updates").iterdir():
            if path.name.startswith(".") or int(path.name[:5]) < before:
                path.unlink()

    def usage(self) -> Iterator[tuple[str, int]]:
        """Yield (relative path, bytes) of every file in the folder."""
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                yield str(path.relative_to(self.path)), path.stat().st_size


def _damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is whole."""
    try:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if storage.sha256(path / name) != expected:
                return f"{name} does not match its hash"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None
