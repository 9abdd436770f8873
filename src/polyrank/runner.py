"""A recipe carried out in a run folder: the run, its control beside it, and going on with both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from polyrank import config
from polyrank.config import Recipe
from polyrank.errors import RunError
from polyrank.federation import Federation, GlobalAdapter, RoundRecord, RunFolder, storage

RECIPE = "recipe.toml"
CONTROL = "control"


class Listener(Protocol):
    """Someone who follows a run, such as a terminal."""

    def begun(self, title: str, federation: Federation, rounds: int) -> None:
        """Tell that a run was set up and will go on from its last finished round."""
        ...

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell of a step forward within a phase."""
        ...

    def round(self, record: RoundRecord) -> None:
        """Tell of a finished round."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The summaries of a run and of its control, if it has one, and where they lie."""

    folder: Path
    summary: Mapping[str, Any]
    control: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Attendance:
    """Who follows a run, when it is to stop, and whether it may go on in other surroundings."""

    listener: Listener
    stop: Callable[[], bool]
    allow_inexact: bool = False


def start(recipe: Recipe, out: Path, attendance: Attendance) -> Outcome:
    """Carry out a recipe in a new folder `out`; with ``control``, also the homogeneous control.

    The control runs on the same clients, seeds and data with the fleet forced to one type, in
    ``out/control``; ``control.json`` holds the differences.
    """
    return _carry_out(recipe, out, attendance, resume=False)


def resume(folder: Path, attendance: Attendance) -> Outcome:
    """Go on with what `start` began in this folder; what is finished is not done again."""
    return _carry_out(config.read(_recipe(folder)), folder, attendance, resume=True)


def _carry_out(recipe: Recipe, folder: Path, attendance: Attendance, *, resume: bool) -> Outcome:
    torch.set_num_threads(recipe.threads)
    finished = _run(recipe, folder, attendance, resume=resume)
    if recipe.control is None:
        return Outcome(folder, finished)
    forced = recipe.with_changes({"control": None, "fleet.force": recipe.control})
    inside = folder / CONTROL
    control = _run(forced, inside, attendance, resume=inside.exists())
    storage.write_json(folder / "control.json", difference(finished, control))
    return Outcome(folder, finished, control)


def _run(
    recipe: Recipe, folder: Path, attendance: Attendance, *, resume: bool
) -> Mapping[str, Any]:
    summary = folder / "summary.json"
    if resume and summary.exists():
        return storage.read_json(summary)
    with _build(recipe, folder, attendance, resume=resume) as federation:
        forced = f", all {recipe.fleet.force}" if recipe.fleet.force else ""
        attendance.listener.begun(f"{recipe.aggregation.rule}{forced}", federation, recipe.rounds)
        for record in federation.rounds(recipe.rounds):
            attendance.listener.round(record)
        return federation.finish()


def _build(recipe: Recipe, folder: Path, attendance: Attendance, *, resume: bool) -> Federation:
    """Return the federation that a recipe describes, in a folder."""
    model = recipe.model.load()
    clients = recipe.clients()
    return Federation(
        model,
        clients,
        recipe.fleet.build(sorted(clients.seen), model, recipe.seed),
        recipe.rule(),
        recipe.local.build(),
        recipe.conduct(),
        out=folder,
        resume=resume,
        allow_inexact=attendance.allow_inexact,
        attachments={RECIPE: recipe.to_toml()},
        progress=attendance.listener.progress,
        stop=attendance.stop,
    )


def opened(folder: Path) -> GlobalAdapter:
    """Return the adapter of a run as its last whole checkpoint has it, finished or not."""
    recipe = config.read(_recipe(folder))
    saved = RunFolder.peek(folder).load_checkpoint()
    if saved is None:
        raise RunError(f"{folder}: no round is finished yet; there is no adapter")
    factors = recipe.rule().adapter(saved.best or saved.state)
    return GlobalAdapter(factors, recipe.model.load(), recipe.conduct().scaling)


def _recipe(folder: Path) -> Path:
    if not (folder / RECIPE).is_file():
        raise RunError(f"{folder}: expected a run folder with a {RECIPE} in it")
    return folder / RECIPE


def difference(summary: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """Return the final scores of run and control, and run minus control, for seen and unseen."""
    found: dict[str, Any] = {"schema": summary["schema"], "method": summary["method"]}
    for who in ("seen", "unseen"):
        found[who] = {}
        for score in ("loss", "exact_match", "rouge_l"):
            ours, theirs = summary["final"][who][score], control["final"][who][score]
            both = ours is not None and theirs is not None
            found[who][score] = {
                "run": ours,
                "control": theirs,
                "difference": ours - theirs if both else None,
            }
    return found
