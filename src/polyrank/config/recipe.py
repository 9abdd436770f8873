"""A recipe: everything about a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
from annotated_types import Ge

from polyrank.config.baselines import BASELINES
from polyrank.config.data import DataSection
from polyrank.config.fleet import FleetSection
from polyrank.config.plan import Devices, PlanSection, check_unchanged, own_devices
from polyrank.config.sections import AggregationSection, BenchmarkSection
from polyrank.config.validation_errors import STRICT
from polyrank.errors import RecipeError
from polyrank.evaluation.settings import BenchmarkSettings, Evaluation
from polyrank.model.settings import ModelSettings
from polyrank.planning import DeviceProfile, Fleet, Scaling, device
from polyrank.rounds.settings import Faults, Sampling, Weighting
from polyrank.run.settings import EarlyStopping, EngineSettings, RunSettings
from polyrank.seeds import derive
from polyrank.settings import OneOf, check, part
from polyrank.training.settings import LocalTraining
from polyrank.training.split.settings import SplitSettings

if TYPE_CHECKING:
    from polyrank.aggregation import Rule
    from polyrank.data import Clients
    from polyrank.evaluation import Benchmark
    from polyrank.model import LoadedModel

SERVER = "server"
UNLIMITED = DeviceProfile(SERVER, 2**62)
"""A server that no plan has to consider."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run. Its TOML sections are the fields here."""

    __pydantic_config__ = STRICT

    name: str = "run"
    """Names the run's folder where no `--out` is given: `runs/NAME`."""
    seed: int = 0
    """From it every random choice derives."""
    rounds: Annotated[int, Ge(1)] = 10
    """How many rounds."""
    control: str | None = None
    """Also run the homogeneous control, all clients of one type: `weakest`, or a type."""
    baseline: Annotated[str, OneOf(BASELINES)] | None = None
    """A method by the name under which papers compare with it, which sets some keys below:
    `splitlora`, `cenlora`, `ft`, `hetlora`, `fedlora`, and with `[plan]` `hsplitlora` and its
    ablations; see [methods](../explanation/methods.md#baselines)."""
    target_loss: float | None = None
    """A validation loss; the summary tells the rounds, bytes and seconds until it was reached."""
    target_perplexity: Annotated[float, Ge(1)] | None = None
    """The same for a perplexity on `benchmark.validation`."""
    devices: Devices = None
    """What kinds of devices offer, beside those of [devices](devices.md): `memory` that training
    may use, and `flops`, `up`, `down`, `latency` where a plan is to consider them."""
    model: ModelSettings
    data: DataSection
    fleet: FleetSection = field(default_factory=FleetSection)
    plan: PlanSection | None = None
    lora: Scaling = field(default_factory=Scaling)
    aggregation: AggregationSection = field(default_factory=AggregationSection)
    local: LocalTraining = field(default_factory=LocalTraining)
    split: SplitSettings = field(default_factory=SplitSettings)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    benchmark: BenchmarkSection | None = None
    early_stopping: EarlyStopping | None = None
    faults: Faults = field(default_factory=Faults)
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        check(self, "recipe")

    def rule(self) -> Rule:
        """Return the aggregation rule, within SLoRA where the local method begins sparsely.

        Raises RecipeError if rule and local method exclude each other.
        """
        return self.local.resolved.with_rule(self.aggregation.build())

    def clients(self) -> Clients:
        """Load the tasks and divide them among clients."""
        return self.data.load(derive(self.seed, "data"))

    def fleet_of(self, clients: Clients) -> Fleet:
        """Return the fleet of the training clients, not yet forced to one type.

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
        devices = {name: device(name, own, dtype) for name in self._fleet().device_names}
        named = None if self.plan is None else self.plan.server
        devices[SERVER] = UNLIMITED if named is None else device(named, own, dtype)
        return devices

    def benchmark_of(self, model: LoadedModel) -> Benchmark | None:
        """Load the held-out sources, if the recipe names some, as token ids of the model."""
        named = self.benchmark
        if named is None:
            return None
        from polyrank.evaluation import Benchmark

        return Benchmark.of(
            model,
            part(BenchmarkSettings, named),
            self.data.encoding(),
            validation=self.data.tasks_of(named.validation, named.validation_split),
            test=self.data.tasks_of(named.test, named.test_split),
            seed=derive(self.seed, "benchmark"),
        )

    def run_settings(self) -> RunSettings:
        """Return how the run is conducted."""
        return RunSettings(
            seed=self.seed,
            sampling=self.sampling,
            weights=part(Weighting, self.aggregation),
            scaling=self.lora,
            evaluation=self.evaluation,
            stopping=self.early_stopping,
            encoding=self.data.encoding(),
            faults=self.faults,
            server_rank=self.aggregation.server_rank,
            cohort=self.engine.clients_in_one_pass,
            target_loss=self.target_loss,
            target_perplexity=self.target_perplexity,
            split=self.split,
            pooled=self.data.pooled,
        )

    def check(self, *, at_server: bool = True) -> None:
        """Build every part that needs neither model nor data, so that mistakes show at once.

        Away from the server the rule is not built: its code need not be there.
        """
        sparse = self.local.resolved.sparse_rounds
        if sparse >= self.rounds:
            raise RecipeError(
                f"local.sparse_rounds: {sparse} of {self.rounds} rounds would be sparse, which "
                "leaves none for LoRA; raise rounds, or lower local.sparse_rounds"
            )
        self.data.check_own(benchmark=self.benchmark is not None)
        if self.target_perplexity is not None and (
            self.benchmark is None or not self.benchmark.validation or not self.benchmark.every
        ):
            raise RecipeError(
                "target_perplexity: needs the perplexity between the rounds; give "
                "benchmark.validation, and benchmark.every above 0"
            )
        if self.devices_of_clients:
            check_unchanged(self._fleet())
        else:
            self._fleet().check({"fleet.force": self.fleet.force, "control": self.control})
        own_devices(self.devices)
        if self.plan is not None:
            self.profiles()
        else:
            self._check_baseline()
        if at_server:
            self.rule()  # Last: rules compute, and importing what they compute with takes a while.

    def _check_baseline(self) -> None:
        """Raise RecipeError if the baseline needs what a recipe without a plan does not give."""
        if self.baseline is None:
            return
        known = BASELINES[self.baseline]
        if known.plan:
            raise RecipeError(
                f"baseline = {self.baseline!r} plans ranks and cuts from devices; describe them: "
                "a section [plan], and devices in fleet.distribution or fleet.clients"
            )
        if known.cut and not self.fleet.cuts:
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
        return replace(
            self, engine=replace(self.engine, threads=threads), fleet=self.fleet.resolved()
        )

    def forced(self, force: str) -> Recipe:
        """Return the homogeneous control: the same, with every client of one type."""
        return replace(self, fleet=replace(self.fleet, force=force), control=None)

    def to_toml(self) -> str:
        """Return the recipe as TOML, defaults written out; keys without a value are left out."""
        return tomli_w.dumps(_without_none(asdict(self)))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }
