"""A run's folder: one owner at a time, nothing overwritten, checkpoints that are whole or absent.

recipe.toml          the resolved recipe (written by the command line)
run.json             versions, threads, cohort size, fingerprints: what must not change
rounds.jsonl         one record a round
base.json            the bare base's evaluation
checkpoints/round-N/ state.safetensors, state.json, best.*, progress.json, manifest.json
updates/             the accepted updates of the round in progress
adapter/             the result, a PEFT folder
spectra.json         its singular values per matrix, in short
evaluation.json, summary.json
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from polyrank.aggregation import Update
from polyrank.algebra import Delta
from polyrank.errors import FolderExistsError, FolderInUseError, ResourceError, RunError
from polyrank.run import checkpoint, storage
from polyrank.run.checkpoint import Checkpoint, CheckpointHead

RUN, SUMMARY = "run.json", "summary.json"
LOCK = ".lock"


class RunFolder:
    """An open run folder, locked against other processes until `close` (or the process's end)."""

    def __init__(self, path: Path, lock: int):
        self.path, self._lock = path, lock
        self.notes: list[str] = []

    @staticmethod
    def create(path: Path, files: Mapping[str, str], first: Checkpoint) -> RunFolder:
        """Make and lock a new folder that holds these files (text by name) and a first checkpoint.

        It is made beside `path` and takes its name when it is complete, so that whatever stops the
        making leaves no folder. FolderExistsError if there is anything at `path`.
        """
        partial = path.with_name(f".{path.name}.partial")
        with _refusal(path):
            _require_nothing(path)
            partial.mkdir(parents=True, exist_ok=True)
            folder = _locked(partial)
            try:
                for left in partial.iterdir():  # By a killed attempt.
                    if left.name != LOCK:
                        storage.remove(left)
                folder.prepare()
                for name, text in {"rounds.jsonl": "", **files}.items():
                    storage.write_text(partial / name, text)
                folder.save_checkpoint(first)
                _require_nothing(path)
                partial.rename(path)
                storage.sync(path.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                folder.close()
                raise
        folder.path = path
        return folder

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Lock an existing run folder; RunError if it is none, FolderInUseError if it is taken."""
        _require_run(path)
        with storage.disk_errors(path):
            folder = _locked(path)
            folder.prepare()
        return folder

    @staticmethod
    def peek(path: Path) -> RunFolder:
        """Look into a folder without locking it: to read, also while a run goes on in it."""
        _require_run(path)
        return RunFolder(path, -1)

    def prepare(self) -> None:
        """Make the folders inside, and remove what a kill left half written or half deleted."""
        for part in ("checkpoints", "updates"):
            (self.path / part).mkdir(exist_ok=True)
        for pattern in (".*.partial", "checkpoints/.*", "updates/.*", ".adapter.*", "..adapter.*"):
            for left in self.path.glob(pattern):
                if left.is_file() or pattern != ".*.partial":  # The folder of another run, perhaps.
                    storage.remove(left)

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

    def records(self, *, each_client: bool = True) -> list[dict[str, Any]]:
        """Return the records of rounds.jsonl; a last line that was cut off is left out.

        Without `each_client` the clients' own scores are left out: they are most of a record.
        """
        records = []
        for record, _ in self._lines():
            if not each_client and record.get("evaluation"):
                record["evaluation"]["server"].pop("clients", None)
            records.append(record)
        return records

    def keep_records(self, last: int) -> None:
        """Drop the records of rounds after `last`: their checkpoint was never finished."""
        path = self.path / "rounds.jsonl"
        rounds, end = [], 0
        for record, stop in self._lines():
            if record["round"] <= last:
                rounds.append(record["round"])
                end = stop
        if rounds != list(range(1, last + 1)):
            raise RunError(
                f"{path}: expected the records of rounds 1 to {last}, found {rounds}; restore the "
                "file from a copy"
            )
        with storage.disk_errors(path), path.open("ab") as file:
            file.truncate(end)
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the whole lines of rounds.jsonl, each with the position after it."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return
        end = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                end += len(line)
                yield record, end

    # --- checkpoints ---

    def save_checkpoint(self, saved: Checkpoint) -> None:
        """Write a checkpoint beside the others, then let go of those before the last two."""
        checkpoint.save(self.path / "checkpoints", saved)

    def load_checkpoint(self) -> Checkpoint:
        """Return the newest whole checkpoint.

        Damaged ones are named in `notes` and, by the owner of the lock, set aside as ``damaged-…``.
        Raises CheckpointError if none can be read whole.
        """
        newest, damaged = checkpoint.load(self.path / "checkpoints")
        self._note(damaged, newest.round)
        for path in damaged:
            if self._lock >= 0:  # Out of the way of the new one, but kept.
                aside = path.with_name(f"damaged-{path.name}")
                storage.remove(aside)
                path.rename(aside)
        if self._lock >= 0:  # A kill may have come before this.
            checkpoint.prune(self.path / "checkpoints")
        return newest

    def load_head(self) -> CheckpointHead:
        """Return the newest whole checkpoint without its state; damaged ones go into `notes`.

        Raises CheckpointError if none is whole.
        """
        head, damaged = checkpoint.load_head(self.path / "checkpoints")
        self._note(damaged, head.round)
        return head

    def _note(self, damaged: Mapping[Path, str], used: int) -> None:
        self.notes += [
            f"checkpoint {path.name} is damaged ({problem}); that of round {used} is used instead"
            for path, problem in damaged.items()
        ]

    # --- updates of the round in progress ---

    def update_path(self, round: int, attempt: int, client: str) -> Path:
        """Where an accepted update lies: the client's name to read, its hash to be unique."""
        name = f"{quote(client, safe=' ')[:100]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"
        return self.path / "updates" / f"{round}-{attempt}-{name}.safetensors"

    def save_update(self, update: Update) -> None:
        """Persist an accepted update."""
        path = self.update_path(update.round, update.attempt, update.client)
        storage.write_update(path, update)

    def load_update(self, round: int, attempt: int, client: str, assignment: str) -> Update | None:
        """Return a persisted update trained from the assignment of this hash.

        None if there is none; one that is damaged, or was trained from another assignment, is
        deleted, and named in `notes`.
        """
        path = self.update_path(round, attempt, client)
        if not path.exists():
            return None
        try:
            update = storage.read_update(path)
        except RunError as error:
            self.notes.append(str(error))
        else:
            if update.assignment == assignment:
                return update
            self.notes.append(f"{path}: it was trained from another assignment")
        path.unlink()
        return None

    def factors(self, round: int, attempt: int, client: str, site: str) -> Delta:
        """Read one site of a persisted update."""
        return storage.read_site(self.update_path(round, attempt, client), site)

    def clear_updates(self, *, last: int) -> None:
        """Delete the updates of rounds up to `last`."""
        for path in (self.path / "updates").glob("*.safetensors"):
            if int(path.name.partition("-")[0]) <= last:
                path.unlink()


def unused(path: Path) -> Path:
    """Return the path, or the first path-2, path-3, … that does not exist."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in count(1))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


def _require_nothing(path: Path) -> None:
    if os.path.lexists(path):
        raise FolderExistsError(
            f"{path}: exists already, and a run never overwrites one; choose another --out, or go "
            f"on with it: polyrank resume {path}"
        )


def _require_run(path: Path) -> None:
    if not (path / RUN).is_file():
        raise RunError(f"{path}: expected a run folder with a {RUN} in it")


@contextmanager
def _refusal(path: Path) -> Iterator[None]:
    """Turn what keeps a folder from being made into a ResourceError or RunError that says so."""
    try:
        with storage.disk_errors(path):
            yield
    except ResourceError as error:
        raise ResourceError(
            f"{path}: the folder could not be written ({error.__cause__}), and nothing of it is "
            "left; make room, or choose another --out"
        ) from error
    except OSError as error:
        raise RunError(f"{path}: the folder cannot be made: {error}") from error


def _locked(path: Path) -> RunFolder:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise FolderInUseError(
                f"{path}: process {owner or '?'} works in this folder; wait for it or stop it"
            ) from None
        raise RunError(f"{path}: the folder cannot be locked: {error}") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return RunFolder(path, lock)
