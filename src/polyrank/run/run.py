"""A run in its folder, round by round, to its result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polyrank.aggregation import State
from polyrank.errors import InterruptedRunError
from polyrank.evaluation.clients import SAMPLES, Scores
from polyrank.evaluation.evaluator import LocalEvaluator, RunEvaluation
from polyrank.planning import Fleet
from polyrank.rounds.assignments import RoundSettings
from polyrank.run import storage
from polyrank.run.adapter import GlobalAdapter
from polyrank.run.attempts import Attempts
from polyrank.run.checkpoint import Checkpoint
from polyrank.run.folder import SUMMARY, RunFolder
from polyrank.run.planning import Planned
from polyrank.run.records import RoundRecord, last_losses
from polyrank.run.setup import Setup, checked_round_settings
from polyrank.run.spectra import write_spectra
from polyrank.run.summary import summary
from polyrank.training.capacity import return_freed_memory

if TYPE_CHECKING:
    from polyrank.run.federation import Federation

BASE, EVALUATION = "base.json", "evaluation.json"


class Run:
    """A run in its folder: `rounds` has its clients train, `finish` has the result scored.

    `Federation.open` and `Federation.resume` make it. `work` are the clients that are measured;
    `seen`, `fleet` and `local` are of those that train, which is one of its own where the run is
    pooled.
    """

    def __init__(
        self,
        parts: Federation,
        setup: Setup,
        folder: RunFolder,
        at: Checkpoint,
        closing: ExitStack,
    ):
        self.model, self.rule, self.settings = parts.model, parts.rule, parts.settings
        self.planning = parts.planning
        self.work, self.skipped, self.engine = setup.work, setup.skipped, setup.engine
        self.local, self.seen = setup.population.local, setup.population.clients
        self.folder, self._at, self._closing = folder, at, closing
        self._parts, self._setup, self._plans = parts, setup, setup.plans
        self._callbacks = parts.callbacks
        self._evaluator = parts.evaluator or LocalEvaluator(
            self.model,
            self.work,
            setup.population.evaluation,
            self._check_stop,
            samples=SAMPLES,
        )
        self._use(setup.rounds, setup.population.fleet, setup.fleet)
        if at.importance.planned:
            self._plans.go_on(at.importance)
            self._use_plans()
        self._last_losses: dict[str, float] = {}
        self._attempts = Attempts(
            self.engine,
            self.folder,
            self.settings,
            self.seen,
            self._callbacks.progress,
            self._check_stop,
        )

    def _use(self, rounds: RoundSettings, fleet: Fleet, measured: Fleet) -> None:
        """Assign by these settings from now on; `measured` has the types of who is scored."""
        self.fleet, self._round_settings = fleet, rounds
        self._evaluation = RunEvaluation(
            self.model,
            self.work,
            measured,
            rounds,
            self._setup.population.evaluation,
            self._evaluator,
            self._callbacks.progress,
            self._check_stop,
            self._parts.benchmark,
        )

    def _use_plans(self) -> None:
        """Assign by the plans in force."""
        if self.planned is not None:
            fleet = self.planned.fleet
            rounds = checked_round_settings(self._parts, self._setup.population, fleet)
            self._use(rounds, fleet, fleet)

    @property
    def planned(self) -> Planned | None:
        """The plans in force, if the run has some."""
        return self._plans.now

    # --- rounds ---

    @property
    def round(self) -> int:
        """The number of finished rounds."""
        return self._at.round

    @property
    def state(self) -> State:
        """The rule's state after the finished rounds."""
        return self._at.state

    @property
    def ranks(self) -> Mapping[str, Mapping[str, int]]:
        """The ranks per training client and site."""
        return self._round_settings.ranks

    @property
    def stopped(self) -> str | None:
        """Why the run ended early, or None."""
        return self._at.progress.stopped

    def rounds(self, until: int) -> Iterator[RoundRecord]:
        """Train up to round number `until`, yielding each finished round's record.

        Ends sooner by early stopping. The last round is evaluated, unless none is. Raises
        RoundFailedError if a round cannot be completed.
        """
        self.base()
        self.folder.keep_records(self._at.round)  # Those of a round whose checkpoint failed go.
        self._last_losses = last_losses(self.folder.records(each_client=False))
        while self._at.round < until and self.stopped is None:
            yield self._one_round(last=self._at.round + 1 == until)

    def _one_round(self, *, last: bool) -> RoundRecord:
        started = time.perf_counter()
        storage.remove(self.folder.path / SUMMARY)  # That of a shorter run, if it was finished.
        attempts = self._attempts.at(self._round_settings, self._at.state, self._at.round + 1)
        round = attempts[-1]
        trained = time.perf_counter()
        self._callbacks.progress("merge", 0, 1)
        state, reports = round.aggregate(
            lambda client, site: self.folder.factors(round.number, round.attempt, client, site)
        )
        merged = time.perf_counter()
        self._callbacks.progress("merge", 1, 1)
        scores = self._evaluation.of_round(state, round.number, last=last)
        held_out = self._evaluation.benchmark_of_round(state, round.number)
        ended = time.perf_counter()
        seconds = {
            "train": trained - started,
            "merge": merged - trained,
            "evaluate": ended - merged,
            "total": ended - started,
        }
        before, modelled = self.planned, self._plans.seconds(round)
        known = self._plans.after(round, state, self._at.importance)
        record = RoundRecord.of(
            attempts,
            self.fleet.at(round.number),
            reports,
            scores,
            seconds,
            benchmark=held_out,
            modelled_seconds=modelled,
            planned_anew=self.planned != before,
            last_losses=self._last_losses,
        )
        self.folder.append_record(record.to_json())
        after = replace(self._checkpoint(state, record), importance=known)
        self.folder.save_checkpoint(after)
        self._at = after
        self._last_losses |= record.losses
        self.folder.clear_updates(last=round.number)
        if record.planned_anew:
            self._use_plans()
        return_freed_memory()
        return record

    def _check_stop(self) -> None:
        if self._callbacks.stop():
            raise InterruptedRunError(
                f"stopped in round {self._at.round + 1}; rounds up to {self._at.round} and the "
                f"updates of finished clients are saved in {self.folder.path}"
            )

    def _checkpoint(self, state: State, record: RoundRecord) -> Checkpoint:
        """Return the checkpoint after a round, early stopping considered.

        An evaluation that was made only because the round was the last does not count: it would not
        be there in a longer run.
        """
        progress, best, stopping = self._at.progress, self._at.best, self.settings.stopping
        scheduled = record.evaluation and record.round % self.settings.evaluation.every == 0
        if stopping and scheduled:
            progress = progress.after(record.round, record.validation_loss, stopping)
            if progress.best_round == record.round and stopping.restore_best:
                best = state
        return Checkpoint(record.round, state, progress, best)

    # --- the result ---

    @property
    def adapter(self) -> GlobalAdapter:
        """The global adapter so far, as the rule keeps it; saved, it is at the server's rank.

        With early stopping that restores the best round, that of the best round.
        """
        factors = self.rule.adapter(self._at.best or self._at.state)
        return GlobalAdapter(factors, self.model, self.settings.scaling, self._setup.server_rank)

    def base(self) -> Scores:
        """Return the bare base's scores on the test parts, measured once and kept."""
        file = self.folder.path / BASE
        if not file.exists():
            storage.write_json(file, self._evaluation.on_test(None, max(1, self.round)))
        return storage.read_json(file)

    def finish(self) -> dict[str, Any]:
        """Evaluate the result on the test parts, write adapter/ and summary.json, return it."""
        self._check_stop()
        final = self._evaluation.on_test(self.adapter.factors, max(1, self.round))
        storage.write_json(self.folder.path / EVALUATION, final)
        with storage.disk_errors(self.folder.path / "adapter"):
            lost = self.adapter.save(self.folder.path / "adapter", overwrite=True)
        result_round = self._at.progress.best_round if self._at.best else self._at.round
        write_spectra(self.folder.path, result_round, self.adapter.factors)
        content = summary(
            method=f"{self.rule.name}{', pooled' if self.settings.pooled else ''}",
            records=self.folder.records(each_client=False),
            base=self.base(),
            final=final,
            target=self.settings.target_loss,
            target_perplexity=self.settings.target_perplexity,
            stopped=self.stopped,
            result_round=result_round,
            adapter_lost=lost,
        )
        storage.write_json(self.folder.path / SUMMARY, content)
        return content

    def close(self) -> None:
        """Release the folder; a temporary one is removed."""
        self.engine.close()
        self._closing.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
