"""A federation: one model, its clients and their ranks, trained round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polyrank.aggregation import DEFAULT, Assignment, FleetSpec, Rule, State
from polyrank.aggregation import rule as rule_called
from polyrank.data import ClientData, Skipped
from polyrank.errors import InterruptedRunError
from polyrank.evaluation.benchmark import Benchmark
from polyrank.evaluation.clients import Scores
from polyrank.evaluation.evaluator import Evaluator, LocalEvaluator, Progress, Scorer
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.rounds.engine import Engine
from polyrank.run import environment as surroundings
from polyrank.run import preflight, setup, storage
from polyrank.run import storage as memory
from polyrank.run.adapter import GlobalAdapter
from polyrank.run.attempts import Attempts
from polyrank.run.checkpoint import Checkpoint
from polyrank.run.engine import InProcessEngine
from polyrank.run.folder import RUN, SUMMARY, RunFolder
from polyrank.run.planning import Planned, Planning
from polyrank.run.population import population
from polyrank.run.records import RoundRecord, summary
from polyrank.run.replanning import Replanning
from polyrank.run.settings import RunSettings
from polyrank.training import LocalTraining, Scoring
from polyrank.training.client_data import ClientWork, fingerprint, prepare


class Federation:
    """A run: `rounds` has its clients train, `finish` has the result scored and writes it.

    With `out` everything is kept in that folder, which must not exist yet, unless `resume` is set:
    then the run goes on after the last whole checkpoint in it. Without `out` a temporary folder is
    used and removed at the end. `attachments` are texts, by file name, to lay into a new folder
    first of all, such as the recipe. `prepared` is what `prepare` gave for these clients, model and
    encoding, where several federations share it. `stop` is asked at every optimizer step and batch
    of an evaluation; once it says yes, the run ends with InterruptedRunError, all saved but the
    clients that were in training.

    `benchmark` are held-out sources that are measured beside the clients. With `engine` and
    `examiner` the clients train and are scored elsewhere; `prepared` then need not hold their data,
    only its sizes.

    `work` are the clients that are measured; `seen`, `fleet` and `local` are of those that train,
    which is one of its own where the run is pooled.

    Raises RecipeError, DataError, RankError, RuleError or ResourceError before any training if the
    parts do not fit together.
    """

    def __init__(
        self,
        model: LoadedModel,
        clients: Mapping[str, ClientData],
        fleet: Fleet,
        rule: Rule | None = None,
        local: LocalTraining | None = None,
        conduct: RunSettings | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        allow_inexact: bool = False,
        attachments: Mapping[str, str] | None = None,
        prepared: tuple[Mapping[str, ClientWork], Skipped] | None = None,
        planning: Planning | None = None,
        benchmark: Benchmark | None = None,
        engine: Engine | None = None,
        examiner: Evaluator | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self.model = model
        self.rule = rule or rule_called(DEFAULT)
        self.conduct = conduct or RunSettings()
        self._progress: Progress = progress or (lambda *_: None)
        self._stop: Callable[[], bool] = stop or (lambda: False)

        self.planning = planning
        self._plans = Replanning(planning, pooled=self.conduct.pooled)
        fleet = fleet if self._planned is None else self._planned.fleet
        self._benchmark = benchmark
        setup.check_names(fleet, clients)
        self.work, self.skipped = prepared or prepare(clients, model, self.conduct.encoding)
        if benchmark is not None:
            self.skipped += benchmark.skipped
        self._examiner = examiner
        who = population(self.work, fleet, local or LocalTraining(), self.conduct, model.spec)
        self.local, self.seen, self._who = who.local, who.clients, who
        preflight.check_measures(self.conduct, model, self.work, benchmark)
        self._use(who.fleet, fleet)
        self._first_fleet = who.fleet
        spec = setup.fleet_spec(self._settings, self.fleet, model.spec, self.conduct.server_rank)
        if planning is not None and not self.conduct.pooled:
            spec = planning.most(spec)
        self._server_rank = spec.server_rank
        first = Checkpoint(0, self.rule.init(spec))
        dealt = setup.heaviest_assignments(self._settings, spec, first.state)
        # A resumed run goes on as often as it began: see `_go_on`.
        scoring = Scoring(
            0 if resume else self._plans.score_every(model), self._plans.metric or "channel"
        )
        self.engine: Engine = engine or self._own_engine(spec, dealt)
        self.engine.scoring = scoring

        with ExitStack() as held:
            made = None if out else TemporaryDirectory(prefix="polyrank-")
            path = Path(held.enter_context(made)) / "run" if made else Path(out or "")
            if resume:
                self.folder = held.enter_context(RunFolder.open(path))
                self._at = self._go_on(allow_inexact)
            else:
                size = self.conduct.sampling.count(len(self.seen))
                growth = self.rule.growth(spec)
                preflight.check_disk(path, first.state, dealt, size, growth)
                begun = RunFolder.create(path, self._begun(attachments or {}), first)
                self.folder = held.enter_context(begun)
                self._at = first
            self._held = held.pop_all()
        self._attempts = Attempts(
            self.engine, self.folder, self.conduct, self.seen, self._progress, self._check_stop
        )

    def _own_engine(self, spec: FleetSpec, dealt: Sequence[Assignment]) -> InProcessEngine:
        """Return the engine of this process, its cohort as large as memory allows."""
        scored, work = self._plans.metric is not None, self._who.work
        cohort = preflight.resolve_cohort(
            self.conduct.cohort, self.model, spec, self.local, work, dealt, scored=scored
        )
        return InProcessEngine(self.model, work, self.local, cohort, self.conduct.split)

    def _use(self, fleet: Fleet, measured: Fleet) -> None:
        """Deal by the ranks and cuts of this fleet from now on; `measured` are who is scored."""
        preflight.check_cuts(self.model, fleet, self.rule, self.conduct.split)
        self.fleet = fleet
        self._settings = setup.round_settings(
            self.rule, fleet, self.model.spec, self._who.work, self.conduct
        )
        self._scorer = Scorer(
            self.model,
            self.work,
            measured,
            self._settings,
            self._who.evaluation,
            self._examiner
            or LocalEvaluator(self.model, self.work, self._who.evaluation, self._check_stop),
            self._progress,
            self._check_stop,
            self._benchmark,
        )

    @property
    def _planned(self) -> Planned | None:
        """The plans in force, if the run has some."""
        return self._plans.now

    # --- before the first round ---

    def _surroundings(self) -> dict[str, Any]:
        settings = setup.described(
            self.rule, self._first_fleet, self.local, self.conduct, self.engine.cohort
        )
        if self.planning is not None:
            settings["plan"] = {
                **self.planning.described(),
                "score_every": self.engine.scoring.every,
            }
        if self._benchmark is not None:
            settings["benchmark"] = self._benchmark.described()
        return surroundings.describe(self.model, fingerprint(self.work), settings)

    def _begun(self, attachments: Mapping[str, str]) -> dict[str, str]:
        """Return the files that a new folder begins with."""
        skipped = {"count": self.skipped.count, "rows": dict(self.skipped.rows)}
        written = {RUN: self._surroundings(), "skipped.json": skipped}
        return {**attachments, **{name: storage.to_json(it) for name, it in written.items()}}

    def _go_on(self, allow_inexact: bool) -> Checkpoint:
        """Return the checkpoint to go on from, after checking that the same run goes on."""
        before = storage.read_json(self.folder.path / RUN)
        surroundings.check_schema(before, self.folder.path / RUN)
        if self.conduct.cohort == "auto":  # Resolved once, stored with the run.
            self.engine.cohort = before["settings"]["cohort"]
        stored = before["settings"].get("plan", {}).get("score_every", 0)
        given = self.planning is not None and self.planning.every != "auto"
        kept = stored if self._plans.metric and not given else 0
        every = kept or self._plans.score_every(self.model)
        self.engine.scoring = replace(self.engine.scoring, every=every)
        saved = self.folder.load_checkpoint()
        now = surroundings.carried_over(
            before, self._surroundings(), round=saved.round, allow_inexact=allow_inexact
        )
        if now != before:
            storage.write_json(self.folder.path / RUN, now)
        self.folder.keep_records(saved.round)
        self.folder.clear_updates(last=saved.round)
        self._plans.go_on(saved.importance)
        if saved.importance.planned and self._planned is not None:
            self._use(self._planned.fleet, self._planned.fleet)
        return saved

    # --- rounds ---

    @property
    def round(self) -> int:
        """The number of finished rounds."""
        return self._at.round

    @property
    def ranks(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks per seen client and site."""
        return self._settings.ranks

    @property
    def stopped(self) -> str | None:
        """Why the run ended early, or None."""
        return self._at.progress.stopped

    def rounds(self, until: int) -> Iterator[RoundRecord]:
        """Train up to round number `until`, yielding each finished round's record.

        Ends sooner by early stopping. Raises RoundFailedError if a round cannot be completed.
        """
        self.base()
        self.folder.keep_records(self._at.round)  # Those of a round whose checkpoint failed go.
        while self._at.round < until and self.stopped is None:
            yield self._one_round()

    def _one_round(self) -> RoundRecord:
        started = time.perf_counter()
        storage.remove(self.folder.path / SUMMARY)  # That of a shorter run, if it was finished.
        attempts = self._attempts.at(self._settings, self._at.state, self._at.round + 1)
        round = attempts[-1]
        trained = time.perf_counter()
        self._progress("merge", 0, 1)
        state, reports = round.aggregate(
            lambda client, site: self.folder.factors(round.number, round.attempt, client, site)
        )
        merged = time.perf_counter()
        self._progress("merge", 1, 1)
        scores = self._scorer.of_round(state, round.number)
        held_out = self._scorer.benchmark_of_round(state, round.number)
        ended = time.perf_counter()
        seconds = {
            "train": trained - started,
            "merge": merged - trained,
            "evaluate": ended - merged,
            "total": ended - started,
        }
        before, modelled = self._planned, self._plans.seconds(round)
        known = self._plans.after(round, state, self._at.importance)
        types = self.fleet.at(round.number)
        record = RoundRecord.of(
            attempts,
            types,
            reports,
            scores,
            seconds,
            benchmark=held_out,
            modelled_seconds=modelled,
            planned_anew=self._planned != before,
        )
        self.folder.append_record(record.to_json())
        after = replace(self._checkpoint(state, record), importance=known)
        self.folder.save_checkpoint(after)
        self._at = after
        self.folder.clear_updates(last=round.number)
        if self._planned is not None and self._planned != before:
            self._use(self._planned.fleet, self._planned.fleet)
        memory.give_back()
        return record

    def _check_stop(self) -> None:
        if self._stop():
            raise InterruptedRunError(
                f"stopped in round {self._at.round + 1}; rounds up to {self._at.round} and the "
                f"updates of finished clients are saved in {self.folder.path}"
            )

    def _checkpoint(self, state: State, record: RoundRecord) -> Checkpoint:
        """Return the checkpoint after a round, early stopping considered."""
        progress, best, stopping = self._at.progress, self._at.best, self.conduct.stopping
        if stopping and record.evaluation is not None:
            progress = progress.after(record.round, record.validation_loss, stopping)
            if progress.best_round == record.round and stopping.restore_best:
                best = state
        return Checkpoint(record.round, state, progress, best)

    # --- the result ---

    @property
    def result_state(self) -> State:
        """The rule's state that the result is read from: the best if early stopping kept one."""
        return self._at.best or self._at.state

    @property
    def adapter(self) -> GlobalAdapter:
        """The global adapter so far, as the rule keeps it; saved, it is at the server's rank."""
        factors = self.rule.adapter(self.result_state)
        return GlobalAdapter(factors, self.model, self.conduct.scaling, self._server_rank)

    def base(self) -> Scores:
        """Return the bare base's scores on the test parts, measured once and kept."""
        file = self.folder.path / "base.json"
        if not file.exists():
            storage.write_json(file, self._scorer.of(None, "test", max(1, self.round), texts=True))
        return storage.read_json(file)

    def finish(self) -> dict[str, Any]:
        """Evaluate the result on the test parts, write adapter/ and summary.json, return it."""
        self._check_stop()
        final = self._scorer.of(self.adapter.factors, "test", max(1, self.round), texts=True)
        storage.write_json(self.folder.path / "evaluation.json", final)
        with storage.disk_errors(self.folder.path / "adapter"):
            lost = self.adapter.save(self.folder.path / "adapter", overwrite=True)
        restored = self._at.best is not None
        content = summary(
            method=f"{self.rule.name}{', pooled' if self.conduct.pooled else ''}",
            records=self.folder.records(each_client=False),
            base=self.base(),
            final=final,
            target=self.conduct.target_loss,
            target_perplexity=self.conduct.target_perplexity,
            stopped=self.stopped,
            result_round=self._at.progress.best_round if restored else self._at.round,
            adapter_lost=lost,
        )
        storage.write_json(self.folder.path / SUMMARY, content)
        return content

    def close(self) -> None:
        """Release the folder; a temporary one is removed."""
        self.engine.close()
        self._held.close()

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
