"""The server of a run whose clients are elsewhere: a recipe, carried out in its run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console

from polyrank.config import Recipe
from polyrank.config.app import AppSettings
from polyrank.config.differences import differences
from polyrank.config.reading import listed
from polyrank.data import Clients, Skipped
from polyrank.errors import FolderExistsError, FolderInUseError, RecipeError
from polyrank.evaluation import Benchmark, Evaluator
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, Limits
from polyrank.protocol.client_info import NodeInfo
from polyrank.remote.admission import Admission, admit
from polyrank.remote.engine import LONGEST, RemoteEngine
from polyrank.remote.evaluator import RemoteEvaluator
from polyrank.remote.hosting import NO_CLIENT_FILES
from polyrank.remote.message_channel import MessageChannel
from polyrank.remote.registration import ClientRegistry, clients_of, discover, work_of
from polyrank.report.console import show
from polyrank.report.progress import RunProgress
from polyrank.rounds import Engine
from polyrank.run import RunFolder
from polyrank.run.environment import config_fingerprint
from polyrank.run.folder import RUN, unused
from polyrank.runner.inspect import RECIPE, recipe_of
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import Outcome, complete, flower_resumes, resumable
from polyrank.split_server.interface import SplitServerHandle
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training import ClientWork
from polyrank.transport import ServingSettings

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


@final
class RemoteParts:
    """The parts of a run whose clients are elsewhere; see `polyrank.runner.parts.Parts`."""

    def __init__(
        self,
        recipe: Recipe,
        settings: AppSettings,
        channel: MessageChannel,
        run: str,
        invocation: Invocation,
        console: Console,
    ):
        self._recipe, self._invocation = recipe, invocation
        self.base: str | None = None
        self._settings, self._channel, self._run, self._console = settings, channel, run, console

    def tell(self, line: str) -> None:
        """Show what happens, as it happens."""
        shown = "".join(c if c.isprintable() else " " for c in line)  # Others wrote parts of it.
        self._console.print(f"  {shown}", highlight=False, markup=False, soft_wrap=True)

    def tell_deadline(self) -> None:
        """Warn of a round that nothing ends."""
        if self._recipe.faults.deadline is None:
            self.tell(
                "faults.deadline is not set: a machine that hangs holds a round up for "
                f"{LONGEST / 3600:.0f} h"
            )

    @cached_property
    def admission(self) -> Admission:
        """The clients that take part, once all that are wanted are there."""
        self._invocation.listener.loading("clients")
        recipe, settings = self._recipe, self._settings
        registry = discover(
            self._channel,
            recipe.fleet.clients,
            settings.clients,
            settings.wait,
            self.tell,
            self._invocation.check_stop,
            self._fits,
        )
        admission = admit(recipe, registry, self.model)
        for client, why in admission.left_out.items():
            self.tell(f"{client} takes no part: {why}")
        return admission

    @property
    def registry(self) -> ClientRegistry:
        """The machines and their clients that take part."""
        return self.admission.registry

    @property
    def left_out(self) -> Mapping[str, str]:
        """The clients that take no part, with the reasons."""
        return self.admission.left_out

    @cached_property
    def fleet(self) -> Fleet:
        """The fleet, not forced to one type."""
        return self.admission.fleet

    @property
    def devices(self) -> Mapping[str, DeviceProfile]:
        """The devices that the clients say they have."""
        return self.admission.devices

    @property
    def limits(self) -> Mapping[str, Limits]:
        """The limits that the clients' owners set, by type of the fleet."""
        return self.admission.limits

    def _fits(self, node: NodeInfo) -> str | None:
        """Say why a machine cannot take part: it would train another model."""
        ours, theirs = config_fingerprint(self.model), node.versions.get("model")
        if theirs == ours:
            return None
        return f"it has another model than {self.model.source}: its configuration differs"

    @cached_property
    def clients(self) -> Clients:
        """The clients that take part, without their examples."""
        return clients_of(self.registry.clients)

    @cached_property
    def model(self) -> LoadedModel:
        """The model: its weights only where the server itself needs them.

        For a benchmark, and to measure how often importance may be scored, with ``plan.every``
        left at auto.
        """
        self._invocation.listener.loading("model")
        recipe = self._recipe
        plan = recipe.plan
        measures = plan is not None and plan.importance != "none" and plan.every == "auto"
        if measures or recipe.benchmark is not None:
            return recipe.model.load()
        return recipe.model.load_bare()

    @cached_property
    def prepared(self) -> tuple[Mapping[str, ClientWork], Skipped]:
        """The clients' sizes."""
        return {client.name: work_of(client) for client in self.registry.clients}, Skipped()

    @cached_property
    def benchmark(self) -> Benchmark | None:
        """The held-out sources, if the recipe names some; the server reads them itself."""
        return self._recipe.benchmark_of(self.model)

    def executors(self, fleet: Fleet) -> tuple[Engine, Evaluator]:
        """Return an engine and an evaluator whose clients train and score on their own machines."""
        recipe, node_of = self._recipe, self.registry.node_of
        deadline = recipe.faults.deadline
        engine = RemoteEngine(
            self._channel,
            node_of,
            self.model,
            self.prepared[0],
            recipe.local,
            recipe.split,
            deadline,
            self._split_server(fleet),
            self.tell,
        )
        evaluator = RemoteEvaluator(
            self._channel,
            node_of,
            deadline or LONGEST,
            self.tell,
            self._invocation.check_stop,
        )
        return engine, evaluator

    def _split_server(self, fleet: Fleet) -> SplitServerHandle | None:
        """Return the split server, if a client may be cut; it starts when it is needed."""
        recipe, split = self._recipe, self._settings.split
        cuts = [fleet.cuts[name] for name in fleet.possible if name in fleet.cuts]
        if not cuts and recipe.plan is None:
            return None
        from polyrank.split_server.process import SplitServerProcess

        uppers = [cut.upper for cut in cuts]
        planned = recipe.plan is not None  # Plans may come to cut anywhere.
        lowest = recipe.plan.lowest_cut if recipe.plan else min(cut.lower for cut in cuts)
        upper = None if planned or None in uppers else max(u for u in uppers if u is not None)
        engine = recipe.engine.clients_in_one_pass
        return SplitServerProcess(
            SplitServerSettings(
                HostedModel(
                    lower=lowest,
                    upper=upper,
                    device=recipe.model.device,
                    **recipe.model.options(),
                ),
                self._run,
                recipe.split,
                listen=split.listen,
                address=split.address or None,
                cohort=1 if engine == "auto" else engine,
                deterministic=recipe.engine.deterministic,
                threads=recipe.engine.threads,
                serving=ServingSettings(gather=split.gather, silence=split.silence),
                patience=split.patience,
            )
        )
