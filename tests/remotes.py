"""Federations whose clients are reached by letters, and the engine beneath them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federations import LOCAL, MEASURED, clients, fleet, one_block, run_of
from letters import Clock, Letters
from polyrank.aggregation import FlexLoRA, Update
from polyrank.data import Skipped
from polyrank.data.types import ClientData
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.protocol import ClientPolicy, read_profile
from polyrank.remote.client import ClientSide, Models
from polyrank.remote.engine import RemoteEngine
from polyrank.remote.evaluator import RemoteEvaluator
from polyrank.remote.message_channel import Message
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
class Held:
    """A model that is there already, for `ClientSide`."""

    model: LoadedModel

    def bare(self) -> LoadedModel:
        return self.model

    def whole(self) -> LoadedModel:
        return self.model

    def head(self, cut: CutPoint) -> LoadedModel:
        return self.model


@dataclass
class OnDisk:
    """A model in a folder, of which split clients load their own blocks alone."""

    folder: Path
    sites: list[str]

    def bare(self) -> LoadedModel:
        return self.whole()

    def whole(self) -> LoadedModel:
        return load_model(str(self.folder), device="cpu", sites=self.sites)

    def head(self, cut: CutPoint) -> LoadedModel:
        own = [Span(0, cut.lower)] + ([] if cut.upper is None else [Span(cut.upper)])
        return load_model(str(self.folder), device="cpu", sites=self.sites, spans=own)


def machine(
    names: list[str],
    data: Mapping[str, ClientData] | None = None,
    model: LoadedModel | Models | None = None,
    *,
    local: LocalTraining = LOCAL,
    evaluation: Evaluation = MEASURED,
    split: SplitSettings = WIRE,
    terms: ClientPolicy | None = None,
) -> ClientSide:
    """Return the machine of some clients of a federation's data."""
    everyone = clients() if data is None else data

    def work(model: LoadedModel) -> Mapping[str, ClientWork]:
        made, _ = prepare(everyone, model, Encoding())
        return {id: one for id, one in made.items() if id in names}

    models = model if isinstance(model, OnDisk) else Held(model or one_block())
    return ClientSide(models, work, local, split, evaluation, terms or ClientPolicy())


def machines(
    data: Mapping[str, ClientData] | None = None, each: int = 1, **rest: Any
) -> dict[int, ClientSide]:
    """Return machines of `each` clients, in the order of their names, numbered from 1."""
    data = clients() if data is None else data
    names = sorted(data)
    groups = [names[i : i + each] for i in range(0, len(names), each)]
    return {number: machine(group, data, **rest) for number, group in enumerate(groups, 1)}


@dataclass
class Reached:
    """Whom a post reaches, and an engine and an examiner that ask them."""

    post: Letters
    homes: Mapping[str, int]
    work: Mapping[str, ClientWork]

    @staticmethod
    def by(post: Letters) -> "Reached":
        """Let the machines of a post say who they are."""
        homes, found = {}, []
        for node in post.nodes():
            payload = post.machines[node].answer("hello", b"")
            for one in read_profile(payload).hosted:
                homes[one.client] = node
                found.append(one)
        found.sort(key=lambda one: one.client)
        return Reached(post, homes, {one.client: work_of(one) for one in found})

    def engine(
        self,
        model: LoadedModel,
        *,
        local: LocalTraining = LOCAL,
        split: SplitSettings = WIRE,
        deadline: float | None = None,
        desk: SplitServerHandle | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> RemoteEngine:
        clock = {} if self.post.clock is None else {"clock": self.post.clock}
        return RemoteEngine(
            self.post, self.homes, model, self.work, local, split, deadline, desk, tell, **clock
        )

    def examiner(
        self,
        tell: Callable[[str], None] = lambda _: None,
        seconds: float = 5.0,
    ) -> RemoteEvaluator:
        clock = {} if self.post.clock is None else {"clock": self.post.clock}
        return RemoteEvaluator(self.post, self.homes, seconds, tell, lambda: None, **clock)


def away(
    post: Letters,
    out: Path | None = None,
    *,
    model: LoadedModel | None = None,
    settings: RunSettings | None = None,
    local: LocalTraining = LOCAL,
    desk: SplitServerHandle | None = None,
    tell: Callable[[str], None] = lambda _: None,
    **rest: Any,
) -> Run:
    """Return a run whose clients are on the machines of a post."""
    reached = Reached.by(post)
    model, settings = model or one_block(), settings or RunSettings(evaluation=MEASURED, cohort=1)
    engine = reached.engine(
        model,
        local=local,
        split=settings.split,
        deadline=settings.faults.deadline,
        desk=desk,
        tell=tell,
    )
    hosted = [
        one
        for node in post.nodes()
        for one in read_profile(post.machines[node].answer("hello", b"")).hosted
    ]
    who = clients_of(hosted)
    rest.setdefault("fleet", fleet(who))
    return run_of(
        out,
        model,
        who,
        local=local,
        settings=settings,
        prepared=(reached.work, Skipped()),
        engine=engine,
        evaluator=reached.examiner(tell),
        **rest,
    )


def post(**rest: Any) -> Letters:
    """Return a post between a machine for every client; see `machines`."""
    return Letters(machines(**rest), clock=Clock())


def orders(post: Letters) -> list[Message]:
    """Return the orders that were sent."""
    return [letter for letter in post.sent if letter.kind == "train"]


def ask(engine: RemoteEngine, names: list[str], **rest: Any) -> list[Update | Failure]:
    """Return an engine's answers to a round's tasks."""
    kinds = Fleet.table(
        dict.fromkeys(engine._work, "one"), types={"one": LoRAType("one", {"all": 2})}, **rest
    )
    spec = engine._model.spec
    made = setup.round_settings(FlexLoRA(), kinds, spec, engine._work, RunSettings())
    round = Round(made, made.rule.init(setup.fleet_spec(made, kinds, spec, None)), 1, 0, names)
    groups = engine.cohorts(names, lambda client: made.cut(client, 1))
    return list(engine.run([[round.task(id) for id in group] for group in groups], None))
