"""Checkpoints: everything from which a run goes on, in folders that are whole or absent.

round-N/ holds state.safetensors and state.json (the rule's state), best.* (the same of the best
evaluation, with early stopping), progress.json, importance.json (in runs that plan, once there are
scores), and manifest.json with the SHA-256 of each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from polyrank.aggregation import State
from polyrank.errors import CheckpointError
from polyrank.run import storage
from polyrank.run.planning import Importance

if TYPE_CHECKING:
    from polyrank.run.settings import EarlyStopping

T = TypeVar("T")

KEEP = 2
"""Checkpoints kept: the newest, and the one before to fall back to."""

_REQUIRED = {"state.safetensors", "state.json", "progress.json"}


@dataclass(frozen=True)
class EarlyStoppingState:
    """The best validation loss with its round, the evaluations since, and why the run stopped."""

    best_loss: float | None = None
    best_round: int = 0
    waited: int = 0
    stopped: str | None = None

    def after(self, round: int, loss: float | None, stopping: EarlyStopping) -> EarlyStoppingState:
        """Return what follows from an evaluation; a `loss` of None was not finite: no progress."""
        if loss is not None and (
            self.best_loss is None or loss < self.best_loss - stopping.min_delta
        ):
            return EarlyStoppingState(loss, round)
        waited = self.waited + 1
        ended = (
            f"no lower validation loss in {stopping.patience} evaluations since round "
            f"{self.best_round}"
        )
        return replace(self, waited=waited, stopped=ended if waited >= stopping.patience else None)


@dataclass(frozen=True)
class Checkpoint:
    """Everything from which a run goes on after round `round` (0: before the first)."""

    round: int
    state: State
    progress: EarlyStoppingState = field(default_factory=EarlyStoppingState)
    best: State | None = None
    importance: Importance = field(default_factory=Importance)


@dataclass(frozen=True)
class CheckpointHead:
    """What a checkpoint says beside the state: enough to show a run, without torch."""

    round: int
    progress: EarlyStoppingState
    has_best: bool

    @property
    def result_round(self) -> int:
        """The round whose adapter is the result: the best one where early stopping keeps it."""
        return self.progress.best_round if self.has_best else self.round


def save(root: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into `root`, then let go of those before the last `KEEP`."""
    target = root / f"round-{checkpoint.round:05d}"
    partial = root / f".{target.name}.partial"
    with storage.disk_errors(target):
        storage.remove(partial)
        partial.mkdir()
        storage.write_state(partial, "state", checkpoint.state)
        if checkpoint.best is not None:
            storage.write_state(partial, "best", checkpoint.best)
        storage.write_json(partial / "progress.json", dataclasses.asdict(checkpoint.progress))
        if checkpoint.importance.scores:
            known = dataclasses.asdict(checkpoint.importance)
            storage.write_json(partial / "importance.json", known)
        hashes = {file.name: storage.sha256(file) for file in sorted(partial.iterdir())}
        storage.write_json(partial / "manifest.json", hashes)
        storage.sync(partial)
        partial.rename(target)
        storage.sync(root)
        prune(root)


def prune(root: Path) -> None:
    """Let go of the checkpoints before the last `KEEP`."""
    for _, old in _finished(root)[KEEP:]:
        going = root / f".{old.name}.old"  # So that half a checkpoint never has its name.
        storage.remove(going)
        old.rename(going)
        storage.remove(going)


def load(root: Path) -> tuple[Checkpoint, dict[Path, str]]:
    """Return the newest whole checkpoint, and what is wrong with each newer one.

    Raises CheckpointError if none can be read whole.
    """
    return _newest(root, _read)


def load_head(root: Path) -> tuple[CheckpointHead, dict[Path, str]]:
    """Return the same without the state; its files are checked against their hashes all the same.

    Raises CheckpointError as `load` does.
    """
    return _newest(root, _read_head)


def _newest(root: Path, read: Callable[[int, Path], T]) -> tuple[T, dict[Path, str]]:
    damaged: dict[Path, str] = {}
    for number, path in _finished(root):
        try:
            return read(number, path), damaged
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            damaged[path] = str(error)
    problems = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
    raise CheckpointError(
        f"{root}: no checkpoint can be read whole ({problems or 'there is none'}); restore one "
        "from a copy, or start the run anew in another folder"
    )


def _finished(root: Path) -> list[tuple[int, Path]]:
    """(round, folder) of every finished checkpoint, newest first."""
    named = ((path.name.removeprefix("round-"), path) for path in root.glob("round-*"))
    return sorted(((int(name), path) for name, path in named if name.isdecimal()), reverse=True)


def _checked(path: Path) -> dict[str, str]:
    """Return the manifest of a checkpoint; ValueError if a file is not the one that was written."""
    hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(hashes, dict) or not hashes.keys() >= _REQUIRED:
        raise ValueError(f"manifest.json does not name {sorted(_REQUIRED)}")
    for name, expected in hashes.items():
        if storage.sha256(path / name) != expected:
            raise ValueError(f"{name} does not match its hash")
    return hashes


def _progress(path: Path) -> EarlyStoppingState:
    return EarlyStoppingState(**json.loads((path / "progress.json").read_text(encoding="utf-8")))


def _read_head(number: int, path: Path) -> CheckpointHead:
    return CheckpointHead(number, _progress(path), "best.json" in _checked(path))


def _read(number: int, path: Path) -> Checkpoint:
    hashes = _checked(path)
    best = storage.read_state(path, "best") if "best.json" in hashes else None
    known = Importance()
    if "importance.json" in hashes:
        known = Importance(**json.loads((path / "importance.json").read_text(encoding="utf-8")))
    state = storage.read_state(path, "state")
    return Checkpoint(number, state, _progress(path), best, known)
