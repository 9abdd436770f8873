"""The parts of a run whose clients are on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import final

from rich.console import Console

from polyrank.config import Recipe
from polyrank.config.app import AppSettings
from polyrank.data import Clients, Skipped
from polyrank.evaluation import Benchmark, Evaluator
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, Limits
from polyrank.protocol.client_info import NodeInfo
from polyrank.remote.admission import Admission, admit
from polyrank.remote.engine import LONGEST, RemoteEngine
from polyrank.remote.evaluator import RemoteEvaluator
from polyrank.remote.message_channel import MessageChannel
from polyrank.remote.registration import ClientRegistry, clients_of, discover, work_of
from polyrank.rounds import Engine
from polyrank.run.environment import config_fingerprint
from polyrank.runner.parts import Invocation
from polyrank.split_server.interface import SplitServerHandle
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training import ClientWork
from polyrank.transport import ServingSettings


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
