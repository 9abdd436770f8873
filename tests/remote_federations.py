"""Federations whose clients are on machines behind a message channel, and their engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federations import LOCAL, MEASURED, clients, fleet, one_block, run_of
from memory_channel import Clock, MemoryChannel
from polyrank.aggregation import FlexLoRA, Update
from polyrank.data import Skipped
from polyrank.data.types import ClientData
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.protocol.client_info import ClientInfo, ClientPolicy, read_node_info
from polyrank.protocol.train_request import TrainRequest, read_train_request
from polyrank.remote.client import ClientNode, ModelLoader
from polyrank.remote.engine import RemoteEngine
from polyrank.remote.evaluator import RemoteEvaluator
from polyrank.remote.registration import clients_of, work_of
from polyrank.rounds.messages import Failure
from polyrank.rounds.round import Round
from polyrank.run import Run, RunSettings, setup
from polyrank.split_server.interface import SplitServerHandle
from polyrank.training import LocalTraining, prepare
from polyrank.training.client_data import ClientWork
from polyrank.training.encoding import Encoding
from polyrank.training.split import SplitSettings

WIRE = SplitSettings(wire="float32")


@dataclass
class LoadedAlready:
    """A model that is in memory, for `ClientNode`."""

    model: LoadedModel

    def bare(self) -> LoadedModel:
        return self.model

    def full(self) -> LoadedModel:
        return self.model

    def client_part(self, cut: CutPoint) -> LoadedModel:
        return self.model


@dataclass
class OnDisk:
    """A model in a folder, of which split clients load their own blocks alone."""

    folder: Path
    sites: list[str]

    def bare(self) -> LoadedModel:
        return self.full()

    def full(self) -> LoadedModel:
        return load_model(str(self.folder), device="cpu", sites=self.sites)

    def client_part(self, cut: CutPoint) -> LoadedModel:
        own = [Span(0, cut.lower)] + ([] if cut.upper is None else [Span(cut.upper)])
        return load_model(str(self.folder), device="cpu", sites=self.sites, spans=own)


def machine(
    names: list[str],
    data: Mapping[str, ClientData] | None = None,
    model: LoadedModel | ModelLoader | None = None,
    *,
    local: LocalTraining = LOCAL,
    evaluation: Evaluation = MEASURED,
    split: SplitSettings = WIRE,
    policy: ClientPolicy | None = None,
) -> ClientNode:
    """Return the machine of some clients of a federation's data."""
    everyone = clients() if data is None else data

    def work(model: LoadedModel) -> Mapping[str, ClientWork]:
        prepared, _ = prepare(everyone, model, Encoding())
        return {id: client for id, client in prepared.items() if id in names}

    models = model if isinstance(model, OnDisk) else LoadedAlready(model or one_block())
    return ClientNode(models, work, local, split, evaluation, policy or ClientPolicy())


def machines(
    data: Mapping[str, ClientData] | None = None, each: int = 1, **rest: Any
) -> dict[int, ClientNode]:
    """Return machines of `each` clients, in the order of their names, numbered from 1."""
    data = clients() if data is None else data
    names = sorted(data)
    groups = [names[i : i + each] for i in range(0, len(names), each)]
    return {number: machine(group, data, **rest) for number, group in enumerate(groups, 1)}


@dataclass
class Reachable:
    """The clients behind a channel, and an engine and an evaluator that ask them."""

    channel: MemoryChannel
    clients: Sequence[ClientInfo]
    node_of: Mapping[str, int]

    @staticmethod
    def by(channel: MemoryChannel) -> "Reachable":
        """Ask the machines of a channel which clients they have."""
        infos, node_of = [], {}
        for node in channel.nodes():
            for client in read_node_info(channel.machines[node].answer("hello", b"")).clients:
                node_of[client.name] = node
                infos.append(client)
        return Reachable(channel, sorted(infos, key=lambda client: client.name), node_of)

    @property
    def work(self) -> Mapping[str, ClientWork]:
        return {client.name: work_of(client) for client in self.clients}

    def engine(
        self,
        model: LoadedModel,
        *,
        local: LocalTraining = LOCAL,
        split: SplitSettings = WIRE,
        deadline: float | None = None,
        split_server: SplitServerHandle | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> RemoteEngine:
        return RemoteEngine(
            self.channel,
            self.node_of,
            model,
            self.work,
            local,
            split,
            deadline,
            split_server,
            tell,
            **self._clock(),
        )

    def evaluator(
        self,
        tell: Callable[[str], None] = lambda _: None,
        seconds: float = 5.0,
    ) -> RemoteEvaluator:
        return RemoteEvaluator(
            self.channel, self.node_of, seconds, tell, lambda: None, **self._clock()
        )

    def _clock(self) -> dict[str, Any]:
        return {} if self.channel.clock is None else {"clock": self.channel.clock}


def remote_federation(
    channel: MemoryChannel,
    out: Path | None = None,
    *,
    model: LoadedModel | None = None,
    settings: RunSettings | None = None,
    local: LocalTraining = LOCAL,
    split_server: SplitServerHandle | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **rest: Any,
) -> Run:
    """Return a run whose clients are on the machines behind a channel."""
    reachable = Reachable.by(channel)
    model, settings = model or one_block(), settings or RunSettings(evaluation=MEASURED, cohort=1)
    engine = reachable.engine(
        model,
        local=local,
        split=settings.split,
        deadline=settings.faults.deadline,
        split_server=split_server,
        tell=tell,
    )
    who = clients_of(reachable.clients)
    rest.setdefault("fleet", fleet(who))
    return run_of(
        out,
        model,
        who,
        local=local,
        settings=settings,
        prepared=(reachable.work, Skipped()),
        engine=engine,
        evaluator=reachable.evaluator(tell),
        **rest,
    )


def channel_to_each(**rest: Any) -> MemoryChannel:
    """Return a channel to a machine for every client; see `machines`."""
    return MemoryChannel(machines(**rest), clock=Clock())


def train_requests(channel: MemoryChannel) -> list[TrainRequest]:
    """Return the train requests that were sent."""
    sent = (message for message in channel.sent if message.kind == "train")
    return [read_train_request(message.payload) for message in sent]


def ask(engine: RemoteEngine, names: list[str], **rest: Any) -> list[Update | Failure]:
    """Return an engine's results of a round's tasks."""
    kinds = Fleet.table(
        dict.fromkeys(engine._work, "one"), types={"one": LoRAType("one", {"all": 2})}, **rest
    )
    spec = engine._model.spec
    made = setup.round_settings(FlexLoRA(), kinds, spec, engine._work, RunSettings())
    round = Round(made, made.rule.init(setup.fleet_spec(made, kinds, spec, None)), 1, 0, names)
    groups = engine.cohorts(names, lambda client: made.cut(client, 1))
    return list(engine.run([[round.task(id) for id in group] for group in groups], None))
