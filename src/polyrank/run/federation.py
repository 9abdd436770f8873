"""A federation: one model, its clients with their ranks, and how they train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyrank.aggregation import DEFAULT, Rule
from polyrank.aggregation import rule as rule_called
from polyrank.data import ClientData, Skipped
from polyrank.evaluation.benchmark import Benchmark
from polyrank.evaluation.evaluator import Evaluator, Progress
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.rounds.engine import Engine
from polyrank.run import environment, preflight, storage
from polyrank.run.adapter import GlobalAdapter
from polyrank.run.checkpoint import Checkpoint
from polyrank.run.folder import RUN, RunFolder
from polyrank.run.planning import Planning
from polyrank.run.records import RoundRecord
from polyrank.run.run import Run
from polyrank.run.settings import RunSettings
from polyrank.run.setup import Setup, described, set_up
from polyrank.training import LocalTraining, Scoring
from polyrank.training.client_data import ClientWork, fingerprint


@dataclass(frozen=True)
class Callbacks:
    """Functions that a run calls: to tell of a step forward, and to ask whether it is to end.

    `stop` is asked at every optimizer step and batch of an evaluation. Once it says yes, the run
    ends with InterruptedRunError; all is saved but the clients that were in training.
    """

    progress: Progress = lambda *_: None
    stop: Callable[[], bool] = lambda: False


@dataclass(eq=False)
class Federation:
    """What takes part in a run, and how it is conducted. Making it computes and checks nothing.

    `open` begins a run in a new folder, `resume` goes on with one. `rounds` and `adapter` are those
    of a run in a temporary folder, which is opened when either is first used.

    `prepared` is what `prepare` gave for these clients, model and encoding, where several
    federations share it. With `planning`, ranks and cuts are planned, and `fleet` has devices for
    types. `benchmark` are held-out sources that are measured beside the clients. With `engine` and
    `evaluator` the clients train and are scored elsewhere; `prepared` then need not hold their
    data, only its sizes.
    """

    model: LoadedModel
    clients: Mapping[str, ClientData]
    fleet: Fleet
    rule: Rule = field(default_factory=lambda: rule_called(DEFAULT))
    local: LocalTraining = field(default_factory=LocalTraining)
    settings: RunSettings = field(default_factory=RunSettings)
    _: KW_ONLY
    prepared: tuple[Mapping[str, ClientWork], Skipped] | None = None
    planning: Planning | None = None
    benchmark: Benchmark | None = None
    engine: Engine | None = None
    evaluator: Evaluator | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)

    def open(self, folder: str | Path | None = None, files: Mapping[str, str] | None = None) -> Run:
        """Begin a run in a new folder; without one in a temporary folder, removed on `Run.close`.

        `files` are texts by name that the folder holds from the first, such as the recipe.

        Raises RecipeError, DataError, RankError, RuleError or ResourceError before there is a
        folder if the parts do not fit together, FolderExistsError if there is something already.
        """
        setup = set_up(self)
        setup.engine.scoring = Scoring(setup.plans.score_every(self.model), setup.plans.metric_name)
        with ExitStack() as closing:
            if folder is None:
                made = closing.enter_context(TemporaryDirectory(prefix="polyrank-"))
                folder = Path(made) / "run"
            path = Path(folder)
            size = self.settings.sampling.count(len(setup.population.clients))
            preflight.check_disk(path, setup.first.state, setup.heaviest, size, setup.growth)
            skipped = {"count": setup.skipped.count, "rows": dict(setup.skipped.rows)}
            written = {RUN: self._environment(setup), "skipped.json": skipped}
            texts = {name: storage.to_json(content) for name, content in written.items()}
            begun = RunFolder.create(path, {**(files or {}), **texts}, setup.first)
            closing.enter_context(begun)
            return Run(self, setup, begun, setup.first, closing.pop_all())

    def resume(self, folder: str | Path, *, allow_inexact: bool = False) -> Run:
        """Go on with the run in a folder after its last whole checkpoint.

        Raises InexactResumeError if the federation or the machine differs from what the run was
        begun with, naming every difference with both values, unless `allow_inexact`; and what
        `open` raises.
        """
        setup = set_up(self)
        with ExitStack() as closing:
            opened = closing.enter_context(RunFolder.open(Path(folder)))
            return Run(
                self,
                setup,
                opened,
                self._last_checkpoint(setup, opened, allow_inexact),
                closing.pop_all(),
            )

    def _last_checkpoint(self, setup: Setup, folder: RunFolder, allow_inexact: bool) -> Checkpoint:
        """Return the checkpoint to go on from, after checking that the same run goes on."""
        file = folder.path / RUN
        before = storage.read_json(file)
        environment.check_schema(before, file)
        self._as_begun(setup, before["settings"])
        saved = folder.load_checkpoint()
        now = environment.carried_over(
            before, self._environment(setup), round=saved.round, allow_inexact=allow_inexact
        )
        if now != before:
            storage.write_json(file, now)
        folder.keep_records(saved.round)
        folder.clear_updates(last=saved.round)
        return saved

    def _as_begun(self, setup: Setup, settings: Mapping[str, Any]) -> None:
        """Set what was chosen when the run was begun: the cohort, and how often to score."""
        if self.settings.cohort == "auto":
            setup.engine.cohort = settings["cohort"]
        chosen = settings.get("plan", {}).get("score_every", 0)
        asked = self.planning is not None and self.planning.every != "auto"
        if not chosen or not setup.plans.metric or asked:
            chosen = setup.plans.score_every(self.model)
        setup.engine.scoring = Scoring(chosen, setup.plans.metric_name)

    def _environment(self, setup: Setup) -> dict[str, Any]:
        """Return what the run's bytes depend on, as run.json keeps it."""
        settings = described(
            self.rule,
            setup.population.fleet,
            setup.population.local,
            self.settings,
            setup.engine.cohort,
        )
        if self.planning is not None:
            every = setup.engine.scoring.every
            settings["plan"] = {**self.planning.described(), "score_every": every}
        if self.benchmark is not None:
            settings["benchmark"] = self.benchmark.described()
        return environment.describe(self.model, fingerprint(setup.work), settings, self.rule)

    # --- the short way ---

    @cached_property
    def _temporary(self) -> Run:
        return self.open()

    def rounds(self, until: int) -> Iterator[RoundRecord]:
        """Train up to round number `until` in a temporary folder; see `Run.rounds`."""
        return self._temporary.rounds(until)

    @property
    def adapter(self) -> GlobalAdapter:
        """The global adapter after the rounds so far."""
        return self._temporary.adapter
