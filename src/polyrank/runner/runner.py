"""A recipe carried out in a run folder: the run, its control beside it, and going on with both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from polyrank.config import Recipe
from polyrank.data import Clients, Skipped
from polyrank.errors import FolderExistsError, InterruptedRunError, RunError
from polyrank.evaluation import Benchmark, Evaluator
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.rounds import Engine
from polyrank.run import Federation, Planning, RoundRecord, storage
from polyrank.run.planning import Importance
from polyrank.runner.inspect import FLEET, RECIPE, recipe_of
from polyrank.runner.plans import planning_of
from polyrank.training import ClientWork, prepare

CONTROL = "control"
BASE = "base.json"
SUMMARY = "summary.json"


class Listener(Protocol):
    """Someone who follows a run, such as a terminal."""

    def loading(self, what: str) -> None:
        """Tell that the data or the model is being loaded."""
        ...

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
class Attendance:
    """Who follows a run, when it is to stop, and whether it may go on in other surroundings."""

    listener: Listener
    stop: Callable[[], bool]
    allow_inexact: bool = False

    def check_stop(self) -> None:
        """Raise InterruptedRunError if the run is to stop."""
        if self.stop():
            raise InterruptedRunError("stopped before the first step")


@dataclass(frozen=True)
class Outcome:
    """The summaries of a run and of its control, if it has one, and where they lie."""

    folder: Path
    summary: Mapping[str, Any]
    control: Mapping[str, Any] | None = None
    forced: str | None = None


class Parts:
    """What runs of one seed have in common, loaded when first needed; data first."""

    def __init__(
        self,
        recipe: Recipe,
        attendance: Attendance,
        load: Callable[[], LoadedModel] | None = None,
    ):
        self._recipe, self._attendance = recipe, attendance
        self._load = load or recipe.model.load
        self.base: str | None = None
        """The base's evaluation as JSON, once it was made."""

    def of(self, recipe: Recipe) -> Parts:
        """Return the parts of a recipe with the same model, such as one of another seed."""
        return Parts(recipe, self._attendance, lambda: self.model)

    @cached_property
    def clients(self) -> Clients:
        """The data, dealt to clients."""
        self._attendance.listener.loading("data")
        return self._recipe.clients()

    @cached_property
    def fleet(self) -> Fleet:
        """The fleet, not forced to one type."""
        return self._recipe.fleet_of(self.clients)

    @cached_property
    def model(self) -> LoadedModel:
        """The model."""
        self._attendance.check_stop()
        self._attendance.listener.loading("model")
        return self._load()

    @cached_property
    def prepared(self) -> tuple[Mapping[str, ClientWork], Skipped]:
        """The clients' examples as token ids, and what could not be used."""
        clients, model = self.clients, self.model
        self._attendance.listener.loading("token ids")
        return prepare(clients, model, self._recipe.data.encoding())

    @property
    def left_out(self) -> Mapping[str, str]:
        """The clients that are there and take no part, with the reasons."""
        return {}

    def planning(self, recipe: Recipe, fleet: Fleet) -> Planning | None:
        """Return how ranks and cuts are planned; None for a recipe without [plan]."""
        if recipe.plan is None:
            return None
        return planning_of(recipe, self.model, fleet, self.prepared[0])

    def elsewhere(self, fleet: Fleet) -> tuple[Engine, Evaluator] | None:  # noqa: ARG002
        """Return who trains and scores the fleet's clients; None: this process does."""
        return None

    @cached_property
    def benchmark(self) -> Benchmark | None:
        """The held-out sources, if the recipe names some."""
        return self._recipe.benchmark_of(self.model)


def start(recipe: Recipe, out: Path, attendance: Attendance) -> Outcome:
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
    return _carry_out(recipe.resolved(), out, attendance, resume=False)


def resume(folder: Path, attendance: Attendance) -> Outcome:
    """Go on with what `start` began in this folder; what is finished is not done again.

    Raises RunError for an unfinished run whose clients have the data.
    """
    recipe = recipe_of(folder)
    if recipe.data.at_clients and _finished(recipe, folder) is None:
        raise RunError(
            f"{folder}: the data of this run lies with its clients, so Flower goes on with it: "
            f"{flower_resumes(folder)}"
        )
    return _carry_out(recipe, folder, attendance, resume=True)


def flower_resumes(folder: Path) -> str:
    """Say how a run over Flower goes on."""
    return (
        "flwr run, with the same app and settings, and with app.resume = true and "
        f"app.out = {str(folder.resolve())!r}"
    )


def _carry_out(recipe: Recipe, folder: Path, attendance: Attendance, *, resume: bool) -> Outcome:
    torch.set_num_threads(recipe.resolved().engine.threads)
    with resumable(folder, folder / RECIPE):
        parts = Parts(recipe, attendance)
        finished = carry_out(recipe, folder, attendance, parts, resume=resume)
        if recipe.control is None:
            return Outcome(folder, finished)
        inside = folder / CONTROL
        parts.base = (folder / BASE).read_text(encoding="utf-8")
        forced = recipe.forced(recipe.control)
        control = carry_out(forced, inside, attendance, parts, resume=inside.exists())
    storage.write_json(folder / "control.json", difference(finished, control))
    return Outcome(folder, finished, control, recipe.control)


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


def carry_out(
    recipe: Recipe,
    folder: Path,
    attendance: Attendance,
    parts: Parts,
    *,
    resume: bool,
    title: str | None = None,
) -> Mapping[str, Any]:
    """Carry out one run, or go on with it, and return its summary."""
    if resume and (finished := _finished(recipe, folder)) is not None:
        return finished
    with train(recipe, folder, attendance, parts, resume=resume, title=title) as federation:
        return federation.finish()


def _finished(recipe: Recipe, folder: Path) -> Mapping[str, Any] | None:
    """Return the summary of a run that has nothing left to do; a recipe may ask for more rounds."""
    if not (folder / SUMMARY).exists():
        return None
    summary: Mapping[str, Any] = storage.read_json(folder / SUMMARY)
    return summary if summary["stopped"] or summary["rounds"] >= recipe.rounds else None


@contextmanager
def train(
    recipe: Recipe,
    folder: Path,
    attendance: Attendance,
    parts: Parts,
    *,
    resume: bool,
    title: str | None = None,
) -> Iterator[Federation]:
    """Train all rounds of a run, or those that are left; its test parts are not looked at yet."""
    force = recipe.fleet.force
    name = recipe.baseline or recipe.aggregation.rule
    rule = f"{name}{f', all clients {force}' if force else ''}"
    with _build(recipe, folder, attendance, parts, resume=resume) as federation:
        attendance.listener.begun(title or rule, federation, recipe.rounds)
        for record in federation.rounds(recipe.rounds):
            attendance.listener.round(record)
        yield federation


def _build(
    recipe: Recipe, folder: Path, attendance: Attendance, parts: Parts, *, resume: bool
) -> Federation:
    """Return the federation that a recipe describes, in a folder."""
    fleet, model = parts.fleet, parts.model
    if not recipe.fleet.cuts:  # The parts may be shared with methods that have some.
        fleet = replace(fleet, cuts={})
    planning = parts.planning(recipe, fleet)
    if planning is not None:
        fleet = planning.planned(Importance()).fleet
    elif recipe.fleet.force:
        fleet = fleet.forced(recipe.fleet.force, model.spec)
    fleet.check_cuts(model.spec)
    recipe.check_fleet(fleet)
    attendance.check_stop()
    described = _fleet_json(fleet, model, recipe.data.pooled, parts.left_out)
    attachments = {RECIPE: recipe.to_toml(), FLEET: described}
    if parts.base is not None:  # The same base on the same data was evaluated before.
        attachments[BASE] = parts.base
    engine, examiner = parts.elsewhere(fleet) or (None, None)
    return Federation(
        model,
        parts.clients,
        fleet,
        recipe.rule(),
        recipe.local.build(),
        recipe.conduct(),
        out=folder,
        resume=resume,
        allow_inexact=attendance.allow_inexact,
        attachments=attachments,
        prepared=parts.prepared,
        benchmark=parts.benchmark,
        planning=planning,
        engine=engine,
        examiner=examiner,
        progress=attendance.listener.progress,
        stop=attendance.stop,
    )


def _fleet_json(fleet: Fleet, model: LoadedModel, pooled: bool, left_out: Mapping[str, str]) -> str:
    """Who has which type in round 1; of every type that may come the rank at each site, its cut.

    Then, if there are some, who takes no part though there, and why.
    In a pooled run the clients are those that are measured; the strongest type trains, uncut.
    """
    by_type, strongest = fleet.ranks_by_type(model.spec), fleet.strongest(model.spec)
    content: dict[str, Any] = {
        "schema": 1,
        "clients": dict(sorted(fleet.at(1).items())),
        "ranks": {strongest: by_type[strongest]} if pooled else by_type,
    }
    cuts = {name: fleet.cuts[name].written for name in fleet.possible if name in fleet.cuts}
    if cuts and not pooled:
        content |= {"cuts": cuts, "blocks": model.spec.blocks}
    if left_out:
        content["left_out"] = dict(sorted(left_out.items()))
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


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
