"""From a recipe to a federation: the parts of a run, wherever its clients are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, final

from polyrank.config import Recipe
from polyrank.data import Clients, Skipped
from polyrank.errors import InterruptedRunError
from polyrank.evaluation import Benchmark, Evaluator
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, Limits
from polyrank.rounds import Engine
from polyrank.run import Callbacks, Federation, RoundRecord, Run
from polyrank.runner.plans import planning_of
from polyrank.training import ClientWork, prepare


class Listener(Protocol):
    """Someone who follows a run, such as a terminal."""

    def loading(self, what: str) -> None:
        """Tell that the data or the model is being loaded."""
        ...

    def begun(self, title: str, run: Run, rounds: int) -> None:
        """Tell that a run was set up and will go on from its last finished round."""
        ...

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell of a step forward within a phase."""
        ...

    def round(self, record: RoundRecord) -> None:
        """Tell of a finished round."""
        ...


@dataclass(frozen=True)
class Invocation:
    """Who follows a run, when it is to stop, and whether it may go on in another environment."""

    listener: Listener
    stop: Callable[[], bool]
    allow_inexact: bool = False

    def check_stop(self) -> None:
        """Raise InterruptedRunError if the run is to stop."""
        if self.stop():
            raise InterruptedRunError("stopped before the first step")


class Parts(Protocol):
    """What runs of one seed have in common; each part is loaded when it is first asked for.

    `base` is the evaluation of the bare base as JSON, once it was made. `fleet` is not forced to
    one type. `devices` are those of the fleet that the recipe does not name, and `limits` those of
    any. `left_out` are clients that are there and take no part, with the reasons.
    """

    base: str | None

    @property
    def clients(self) -> Clients: ...  # noqa: D102
    @property
    def fleet(self) -> Fleet: ...  # noqa: D102
    @property
    def model(self) -> LoadedModel: ...  # noqa: D102
    @property
    def prepared(self) -> tuple[Mapping[str, ClientWork], Skipped]: ...  # noqa: D102
    @property
    def benchmark(self) -> Benchmark | None: ...  # noqa: D102
    @property
    def devices(self) -> Mapping[str, DeviceProfile]: ...  # noqa: D102
    @property
    def limits(self) -> Mapping[str, Limits]: ...  # noqa: D102
    @property
    def left_out(self) -> Mapping[str, str]: ...  # noqa: D102

    def executors(self, fleet: Fleet) -> tuple[Engine | None, Evaluator | None]:
        """Return who trains and scores the fleet's clients; None: this process."""
        ...


@final
class LocalParts:
    """The parts of runs whose clients are in this process; data is loaded first."""

    devices: Mapping[str, DeviceProfile] = {}
    limits: Mapping[str, Limits] = {}
    left_out: Mapping[str, str] = {}

    def __init__(
        self,
        recipe: Recipe,
        invocation: Invocation,
        load: Callable[[], LoadedModel] | None = None,
    ):
        self._recipe, self._invocation = recipe, invocation
        self._load = load or recipe.model.load
        self.base: str | None = None

    def of(self, recipe: Recipe) -> LocalParts:
        """Return the parts of a recipe with the same model, such as one of another seed."""
        return LocalParts(recipe, self._invocation, lambda: self.model)

    @cached_property
    def clients(self) -> Clients:
        """The data, partitioned among clients."""
        self._invocation.listener.loading("data")
        return self._recipe.clients()

    @cached_property
    def fleet(self) -> Fleet:
        """The fleet of the recipe."""
        return self._recipe.fleet_of(self.clients)

    @cached_property
    def model(self) -> LoadedModel:
        """The model."""
        self._invocation.check_stop()
        self._invocation.listener.loading("model")
        return self._load()

    @cached_property
    def prepared(self) -> tuple[Mapping[str, ClientWork], Skipped]:
        """The clients' examples as token ids, and what could not be used."""
        clients, model = self.clients, self.model
        self._invocation.listener.loading("token ids")
        return prepare(clients, model, self._recipe.data.encoding())

    @cached_property
    def benchmark(self) -> Benchmark | None:
        """The held-out sources, if the recipe names some."""
        return self._recipe.benchmark_of(self.model)

    def executors(self, fleet: Fleet) -> tuple[None, None]:  # noqa: ARG002
        """Return nobody: this process trains and scores."""
        return None, None


def federation_of(recipe: Recipe, parts: Parts, invocation: Invocation) -> Federation:
    """Return the federation that a recipe describes; RecipeError where the parts do not fit it."""
    fleet, model = parts.fleet, parts.model
    if not recipe.fleet.cuts:  # The parts may be shared with methods that have some.
        fleet = replace(fleet, cuts={})
    planning = None
    if recipe.plan is not None:
        work = parts.prepared[0]
        planning = planning_of(recipe, model, fleet, work, parts.devices, parts.limits)
        fleet = planning.first.fleet
    elif recipe.fleet.force:
        fleet = fleet.forced(recipe.fleet.force, model.spec)
    fleet.check_cuts(model.spec)
    recipe.check_fleet(fleet)
    invocation.check_stop()
    engine, evaluator = parts.executors(fleet)
    return Federation(
        model,
        parts.clients,
        fleet,
        recipe.rule(),
        recipe.local,
        recipe.run_settings(),
        prepared=parts.prepared,
        planning=planning,
        benchmark=parts.benchmark,
        engine=engine,
        evaluator=evaluator,
        callbacks=Callbacks(invocation.listener.progress, invocation.stop),
    )


def fleet_json(federation: Federation, left_out: Mapping[str, str]) -> str:
    """Return fleet.json: the type of each client in round 1; ranks at each site and cut by type.

    Types that may come later are there too, and who takes no part though there, with the reason. In
    a pooled run the clients are those that are measured; the strongest type trains, uncut.
    """
    fleet, spec, pooled = federation.fleet, federation.model.spec, federation.settings.pooled
    by_type, strongest = fleet.ranks_by_type(spec), fleet.strongest(spec)
    content: dict[str, Any] = {
        "schema": 1,
        "clients": dict(sorted(fleet.at(1).items())),
        "ranks": {strongest: by_type[strongest]} if pooled else by_type,
    }
    cuts = {name: fleet.cuts[name].written for name in fleet.possible if name in fleet.cuts}
    if cuts and not pooled:
        content |= {"cuts": cuts, "blocks": spec.blocks}
    if left_out:
        content["left_out"] = dict(sorted(left_out.items()))
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
