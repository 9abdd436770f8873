"""The server of a run whose clients are elsewhere: a recipe, carried out in its run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from polyrank.config import Recipe
from polyrank.config.app import AppSettings
from polyrank.config.differences import differences
from polyrank.config.reading import listed
from polyrank.errors import FolderExistsError, FolderInUseError, RecipeError
from polyrank.remote.hosting import NO_CLIENT_FILES
from polyrank.remote.message_channel import MessageChannel
from polyrank.remote.parts import RemoteParts
from polyrank.report.console import show
from polyrank.report.progress import RunProgress
from polyrank.run import RunFolder
from polyrank.run.folder import RUN, unused
from polyrank.runner.inspect import RECIPE, recipe_of
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import Outcome, complete, flower_resumes, resumable

WIDTH = 120
"""Columns of what is shown, which Flower keeps as its log."""
WHERE_THE_MODEL_IS = ("model.source", "model.revision", "model.device")
"""Keys that may differ when a run goes on: run.json tells whether it is the same model."""


def serve(recipe: Recipe, settings: AppSettings, channel: MessageChannel, run: str) -> Outcome:
    """Carry out a recipe with the clients that `channel` reaches: a new run, or one that was begun.

    A new run takes a new folder, ``app.out`` or one in ``runs``, seen from where the server was
    started; with ``app.resume`` the run in ``app.out`` goes on. What happens is shown on stderr as
    it happens, and the result at the end.

    Raises FolderExistsError if a new run's folder exists, and RecipeError for what cannot be done
    with clients elsewhere, for settings that are not those of the run that is to go on, or if too
    few clients come.
    """
    check(recipe, settings, simulated=channel.simulated)
    folder = folder_of(recipe, settings)
    recipe = recipe_to_resume(recipe, folder) if settings.resume else recipe.resolved()
    torch.set_num_threads(recipe.engine.threads)
    console = Console(file=sys.stderr, width=WIDTH)
    with RunProgress(console) as terminal:
        # Flower ends this process, whenever it is told to; the folder is whole at any moment.
        invocation = Invocation(terminal, lambda: False, settings.allow_inexact)
        console.print(f"run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
        with resumable(folder, folder / RECIPE, flower_resumes(folder)):
            parts = RemoteParts(recipe, settings, channel, run, invocation, console)
            if settings.resume:
                wait_for(folder, parts.tell)
            parts.tell_deadline()
            result = complete(recipe, folder, invocation, parts, resume=settings.resume)
    outcome = Outcome(folder, result)
    show(outcome, as_json=False)
    return outcome


def folder_of(recipe: Recipe, settings: AppSettings) -> Path:
    """Return the run's folder; FolderExistsError if it exists and is not to be resumed."""
    if not settings.out:
        return unused(Path("runs") / recipe.name).resolve()
    folder = Path(settings.out).expanduser().resolve()
    if folder.exists() and not settings.resume:
        raise FolderExistsError(
            f"app.out: {folder} exists already, and a run never overwrites one; give another "
            "folder, or go on with the run in it: app.resume = true"
        )
    return folder


def recipe_to_resume(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of the run in a folder, with the model where `recipe` says it lies now.

    Raises RunError for a folder without a run, and RecipeError, naming every key with both values,
    if `recipe` says anything else than the folder's.
    """
    begun = recipe_of(folder)
    own = {*WHERE_THE_MODEL_IS, *(() if recipe.engine.threads else ("engine.threads",))}
    differing = [
        f"{key}: {_written(before)} there, {_written(now)} here"
        for key, before, now in differences(begun, recipe.resolved())
        if key not in own
    ]
    if differing:
        place = f"app.resume: the run in {folder} was begun with other settings"
        raise RecipeError(
            f"{listed(place, differing)}\ngive the same settings, or begin a new run: leave "
            "app.resume out, and give another app.out"
        )
    return replace(begun, model=recipe.model)


def _written(value: Any) -> str:
    return "left out" if value is None else repr(value)


def wait_for(
    folder: Path,
    tell: Callable[[str], None],
    seconds: float = 60.0,
    pause: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait until no process works in a run's folder; FolderInUseError if one still does then.

    A server that Flower has stopped, or that has lost its SuperLink, takes a while to end.
    """
    until, told = clock() + seconds, False
    while (folder / RUN).is_file():
        try:
            RunFolder.open(folder).close()
            return
        except FolderInUseError as error:
            if clock() >= until:
                raise
            if not told:
                tell(f"waiting for another process to end: {error}")
            told = True
            time.sleep(pause)


def check(recipe: Recipe, settings: AppSettings, *, simulated: bool) -> None:
    """Raise RecipeError for what needs all data in one process, or data that nobody has."""
    if recipe.data.pooled:
        raise RecipeError("data.pooled: clients elsewhere keep their data; use polyrank run")
    if recipe.control is not None:
        raise RecipeError(
            "control: a run over Flower has none; make a second app, with fleet.force = "
            f"{recipe.control!r}"
        )
    if simulated and recipe.data.at_clients and not settings.client_files:
        raise RecipeError(NO_CLIENT_FILES)
