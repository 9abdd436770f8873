"""A recipe carried out in a run folder: the run, its control beside it, and going on with both."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyrank.aggregation import is_custom
from polyrank.config import Recipe
from polyrank.errors import FolderExistsError, InterruptedRunError, RunError
from polyrank.run import Run, storage
from polyrank.run.folder import SUMMARY
from polyrank.run.run import BASE
from polyrank.runner.inspect import FLEET, RECIPE, recipe_of
from polyrank.runner.parts import Invocation, LocalParts, Parts, federation_of, fleet_json

CONTROL = "control"


@dataclass(frozen=True)
class Result:
    """A run's summary; `finished_before` if an earlier command made it and nothing was trained."""

    summary: Mapping[str, Any]
    finished_before: bool = False


@dataclass(frozen=True)
class Outcome:
    """The results of a run and of its control, if it has one, and the folder they lie in."""

    folder: Path
    run: Result
    control: Result | None = None
    forced: str | None = None


def start(recipe: Recipe, out: Path, invocation: Invocation) -> Outcome:
    """Carry out a recipe in a new folder `out`; with ``control``, also the homogeneous control.

    The control runs on the same clients, seeds and data with the fleet forced to one type, in
    ``out/control``; ``control.json`` holds the differences. Whatever can fail before training does
    so before `out` is made, as far as it can be foreseen.
    """
    if out.exists():
        raise FolderExistsError(
            f"{out}: exists already, and a run never overwrites one; choose another --out, or go "
            f"on with it: polyrank resume {out}"
        )
    return _run_both(recipe.resolved(), out, invocation, resume=False)


def resume(folder: Path, invocation: Invocation) -> Outcome:
    """Go on with what `start` began in this folder; what is finished is not done again.

    Raises RunError for an unfinished run whose clients have the data.
    """
    recipe = recipe_of(folder)
    if recipe.data.at_clients and _finished(recipe, folder) is None:
        raise RunError(
            f"{folder}: the data of this run lies with its clients, so Flower goes on with it: "
            f"{flower_resumes(folder)}"
        )
    return _run_both(recipe, folder, invocation, resume=True)


def flower_resumes(folder: Path) -> str:
    """Say how a run over Flower goes on."""
    return (
        "flwr run, with the same app and settings, and with app.resume = true and "
        f"app.out = {str(folder.resolve())!r}"
    )


def _run_both(recipe: Recipe, folder: Path, invocation: Invocation, *, resume: bool) -> Outcome:
    torch.set_num_threads(recipe.resolved().engine.threads)
    with resumable(folder, folder / RECIPE):
        parts = LocalParts(recipe, invocation)
        run = complete(recipe, folder, invocation, parts, resume=resume)
        if recipe.control is None:
            return Outcome(folder, run)
        inside = folder / CONTROL
        parts.base = (folder / BASE).read_text(encoding="utf-8")
        forced = recipe.forced(recipe.control)
        control = complete(forced, inside, invocation, parts, resume=inside.exists())
    storage.write_json(folder / "control.json", difference(run.summary, control.summary))
    return Outcome(folder, run, control, recipe.control)


@contextmanager
def resumable(folder: Path, first: Path, how: str | None = None) -> Iterator[None]:
    """Say of an interruption how to go on in `folder`, which was begun if `first` is a file."""
    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        how = f"go on with: {how or f'polyrank resume {folder}'}"
        how = how if first.is_file() else "nothing was begun"
        why = str(error) or "stopped at once; finished rounds and clients are saved"
        raise InterruptedRunError(f"{why}\n{how}") from error


def complete(
    recipe: Recipe,
    folder: Path,
    invocation: Invocation,
    parts: Parts,
    *,
    resume: bool,
    title: str | None = None,
) -> Result:
    """Carry out one run, or go on with it, and return its result; a finished run is left alone."""
    if resume and (finished := _finished(recipe, folder)) is not None:
        return finished
    with train(recipe, folder, invocation, parts, resume=resume, title=title) as run:
        return Result(run.finish())


def _finished(recipe: Recipe, folder: Path) -> Result | None:
    """Return the result of a run that has nothing left to do; a recipe may ask for more rounds."""
    if not (folder / SUMMARY).exists():
        return None
    summary: Mapping[str, Any] = storage.read_json(folder / SUMMARY)
    done = summary["stopped"] or summary["rounds"] >= recipe.rounds
    return Result(summary, finished_before=True) if done else None


@contextmanager
def train(
    recipe: Recipe,
    folder: Path,
    invocation: Invocation,
    parts: Parts,
    *,
    resume: bool,
    title: str | None = None,
) -> Iterator[Run]:
    """Train all rounds of a run, or those that are left; its test parts are not looked at yet."""
    force = recipe.fleet.force
    name = recipe.baseline or recipe.aggregation.rule
    rule = f"{name}{f', all clients {force}' if force else ''}"
    with _opened(recipe, folder, invocation, parts, resume=resume) as run:
        invocation.listener.begun(title or rule, run, recipe.rounds)
        for record in run.rounds(recipe.rounds):
            invocation.listener.round(record)
        yield run


def _opened(
    recipe: Recipe, folder: Path, invocation: Invocation, parts: Parts, *, resume: bool
) -> Run:
    """Return the run that a recipe describes, begun or resumed in a folder."""
    federation = federation_of(recipe, parts, invocation)
    if resume:
        return federation.resume(folder, allow_inexact=invocation.allow_inexact)
    files = {RECIPE: recipe.to_toml(), FLEET: fleet_json(federation, parts.left_out)}
    files |= own_code(recipe.aggregation.rule)
    if parts.base is not None:  # The same base on the same data was evaluated before.
        files[BASE] = parts.base
    return federation.open(folder, files)


def own_code(rule: str) -> dict[str, str]:
    """Return the module of a rule of the user's own, to lie beside the recipe in a run's folder.

    A rule in a package is not copied: the package is installed, or is found where it was.
    """
    module, _, _ = rule.partition(":")
    if not is_custom(rule) or "." in module:
        return {}
    return {f"{module}.py": inspect.getsource(importlib.import_module(module))}


def difference(summary: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """Return the final scores of run and control, and run minus control, for seen and unseen."""
    content: dict[str, Any] = {"schema": summary["schema"], "method": summary["method"]}
    for who in ("seen", "unseen"):
        content[who] = {}
        for score in ("loss", "exact_match", "rouge_l"):
            ours, theirs = summary["final"][who][score], control["final"][who][score]
            both = ours is not None and theirs is not None
            content[who][score] = {
                "run": ours,
                "control": theirs,
                "difference": ours - theirs if both else None,
            }
    return content
