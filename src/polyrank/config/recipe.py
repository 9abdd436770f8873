"""A recipe: everything about a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import tomli_w
from pydantic import Field

from polyrank.aggregation import Rule, SLoRA
from polyrank.config.baselines import BASELINES, Name
from polyrank.config.benchmark import BenchmarkSection
from polyrank.config.fleet import FleetSection
from polyrank.config.model_and_data import DataSection, ModelSection, check_own
from polyrank.config.plan import Devices, PlanSection, check_unchanged, own_devices
from polyrank.config.section import Section
from polyrank.config.sections import (
    AggregationSection,
    EngineSection,
    EvaluationSection,
    FaultsSection,
    LocalSection,
    LoRASection,
    SamplingSection,
    SplitSection,
    StoppingSection,
)
from polyrank.data import Clients
from polyrank.errors import RecipeError
from polyrank.evaluation import Benchmark
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, device
from polyrank.run import RunSettings
from polyrank.seeds import derive

SERVER = "server"
UNLIMITED = DeviceProfile(SERVER, 2**62)
"""A server that no plan has to consider."""


class Recipe(Section):
    """Everything about a run. Its TOML sections are the fields here."""

    name: str = "run"
    """Names the run's folder where no `--out` is given: `runs/NAME`."""
    seed: int = 0
    """From it every random choice derives."""
    rounds: int = Field(default=10, ge=1)
    """How many rounds."""
    control: str | None = None
    """Also run the homogeneous control, all clients of one type: `weakest`, or a type."""
    baseline: Name | None = None
    """A method by the name under which papers compare with it, which sets some keys below:
    `splitlora`, `cenlora`, `ft`, `hetlora`, `fedlora`, and with `[plan]` `hsplitlora` and its
    ablations; see [methods](../explanation/methods.md#baselines)."""
    target_loss: float | None = None
    """A validation loss; the summary tells the rounds, bytes and seconds until it was reached."""
    target_perplexity: float | None = None
    """The same for a perplexity on `benchmark.validation`."""
    devices: Devices = None
    """What kinds of devices offer, beside those of [devices](devices.md): `memory` that training
    may use, and `flops`, `up`, `down`, `latency` where a plan is to consider them."""
    model: ModelSection
    data: DataSection
    fleet: FleetSection = FleetSection()
    plan: PlanSection | None = None
    lora: LoRASection = LoRASection()
    aggregation: AggregationSection = AggregationSection()
    local: LocalSection = LocalSection()
    split: SplitSection = SplitSection()
    sampling: SamplingSection = SamplingSection()
    evaluation: EvaluationSection = EvaluationSection()
    benchmark: BenchmarkSection | None = None
    early_stopping: StoppingSection | None = None
    faults: FaultsSection = FaultsSection()
    engine: EngineSection = EngineSection()

    def rule(self) -> Rule:
        """Return the aggregation rule, within SLoRA where the local method begins sparsely.

        Raises RecipeError if rule and local method exclude each other.
        """
        rule, settings = self.aggregation.build(), self.local.settings()
        for method in settings.methods:
            if method in rule.excludes:
                raise RecipeError(
                    f"aggregation.rule = {rule.name!r} and the local method {method!r} exclude "
                    f"each other: {rule.excludes[method]}; change one of them"
                )
        return SLoRA(rule, settings.sparse_rounds) if settings.sparse_rounds else rule

    def clients(self) -> Clients:
        """Load the tasks and deal them to clients."""
        return self.data.load(derive(self.seed, "data"))

    def fleet_of(self, clients: Clients) -> Fleet:
        """Return the fleet of the seen clients, not yet forced to one type.

        With a plan its types are devices, of which the ranks are yet to be planned.
        """
        return self._fleet().build(clients.seen, derive(self.seed, "fleet"))

    @property
    def devices_of_clients(self) -> bool:
        """Whether ranks are planned for the devices that the clients say they have."""
        return self.plan is not None and self.data.at_clients and self.fleet.names_none

    def _fleet(self) -> FleetSection:
        return self.fleet if self.plan is None else self.fleet.of_devices()

    def profiles(self) -> dict[str, DeviceProfile]:
        """Return the devices that the fleet names, and as ``server`` that of the tails.

        Raises RecipeError for names that are known nowhere, and figures that cannot be.
        """
        own = own_devices(self.devices)
        dtype = self.model.dtype
        found = {name: device(name, own, dtype) for name in self._fleet().device_names}
        named = None if self.plan is None else self.plan.server
        found[SERVER] = UNLIMITED if named is None else device(named, own, dtype)
        return found

    def benchmark_of(self, model: LoadedModel) -> Benchmark | None:
        """Load the held-out sources, if the recipe names some, as token ids of the model."""
        named = self.benchmark
        if named is None:
            return None
        read, validation, test = self.data.tasks, named.validation, named.test
        return Benchmark.of(
            model,
            named.build(),
            self.data.encoding(),
            validation=None if validation is None else read(validation, named.validation_split),
            test=None if test is None else read(test, named.test_split),
            seed=derive(self.seed, "benchmark"),
        )

    def run_settings(self) -> RunSettings:
        """Return how the run is conducted."""
        return RunSettings(
            seed=self.seed,
            sampling=self.sampling.build(),
            weights=self.aggregation.weighting(),
            scaling=self.lora.build(),
            evaluation=self.evaluation.build(),
            stopping=self.early_stopping.build() if self.early_stopping else None,
            encoding=self.data.encoding(),
            faults=self.faults.build(),
            server_rank=self.aggregation.server_rank,
            cohort=self.engine.clients_in_one_pass(),
            target_loss=self.target_loss,
            target_perplexity=self.target_perplexity,
            split=self.split.build(),
            pooled=self.data.pooled,
        )

    def check(self) -> None:
        """Build every part that needs neither model nor data, so that mistakes show at once."""
        self.rule()
        sparse = self.local.settings().sparse_rounds
        if sparse >= self.rounds:
            raise RecipeError(
                f"local.sparse_rounds: {sparse} of {self.rounds} rounds would be sparse, which "
                "leaves none for LoRA; raise rounds, or lower local.sparse_rounds"
            )
        self.run_settings()
        check_own(self.data, benchmark=self.benchmark is not None)
        if self.benchmark is not None:
            self.benchmark.build()
        if self.target_perplexity is not None and (
            self.benchmark is None or not self.benchmark.validation or not self.benchmark.every
        ):
            raise RecipeError(
                "target_perplexity: needs the perplexity between the rounds; give "
                "benchmark.validation, and benchmark.every above 0"
            )
        self.local.build()
        if self.devices_of_clients:
            check_unchanged(self._fleet())
        else:
            self._fleet().check((self.fleet.force, self.control))
        own_devices(self.devices)
        if self.plan is not None:
            self.plan.build()
            self.profiles()
            return
        if self.baseline is not None and BASELINES[self.baseline].plan:
            raise RecipeError(
                f"baseline = {self.baseline!r} plans ranks and cuts from devices; describe them: "
                "a section [plan], and devices in fleet.distribution or fleet.clients"
            )
        if self.baseline is not None and BASELINES[self.baseline].cut and not self.fleet.cuts:
            raise RecipeError(
                f"baseline = {self.baseline!r} cuts every client's model at the same block; give "
                "the type that all have in [fleet.cuts], e.g. T1 = 2"
            )

    def check_fleet(self, fleet: Fleet) -> None:
        """Raise RecipeError if the baseline does not go with the types that clients have."""
        if self.baseline is None or not BASELINES[self.baseline].cut:
            return
        whole = [name for name in fleet.possible if name not in fleet.cuts]
        if whole:
            raise RecipeError(
                f"baseline = {self.baseline!r} cuts every client's model, and clients of type "
                f"{whole[0]} have no cut; give one in [fleet.cuts], e.g. {whole[0]} = 2 (or, with "
                "[plan], budgets that need one)"
            )

    def resolved(self) -> Recipe:
        """Return the recipe with what depends on this machine chosen, and its trace read in."""
        threads = self.engine.threads or cores()
        return self.model_copy(
            update={
                "engine": self.engine.model_copy(update={"threads": threads}),
                "fleet": self.fleet.resolved(),
            }
        )

    def forced(self, force: str) -> Recipe:
        """Return the homogeneous control: the same, with every client of one type."""
        fleet = self.fleet.model_copy(update={"force": force})
        return self.model_copy(update={"fleet": fleet, "control": None})

    def to_toml(self) -> str:
        """Return the recipe as TOML, defaults written out; keys without a value are left out."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }
