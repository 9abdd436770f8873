"""A federation: one model, its clients and their ranks, trained round by round."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polyrank.aggregation import FleetSpec, FlexLoRA, Rule, State
from polyrank.data import ClientData
from polyrank.errors import (
    InterruptedRunError,
    RankError,
    RoundFailedError,
    UpdateError,
)
from polyrank.federation import preflight, storage, surroundings
from polyrank.federation.engine import InProcess
from polyrank.federation.evaluate import Scores
from polyrank.federation.folder import Checkpoint, RunFolder
from polyrank.federation.records import SCHEMA, RoundRecord, summary
from polyrank.federation.result import GlobalAdapter
from polyrank.federation.round import Round, RoundSettings, sample_clients
from polyrank.federation.scorer import Progress, Scorer
from polyrank.federation.settings import Conduct
from polyrank.federation.work import fingerprint, prepare
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.training import LocalTraining


class Federation:
    """A run in this process: `rounds` trains, `finish` evaluates and writes the result.

    With `out` everything is kept in that folder, which must not exist yet, unless `resume` is set:
    then the run goes on after the last whole checkpoint in it. Without `out` a temporary folder is
    used and removed at the end. `attachments` are texts, by file name, to lay into a new folder
    first of all, such as the recipe. `stop` is asked between optimizer steps; once it says yes, the
    run ends with InterruptedRunError, all saved but the clients that were in training.

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
        conduct: Conduct | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        allow_inexact: bool = False,
        attachments: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self.model, self.fleet = model, fleet
        self.rule = rule or FlexLoRA()
        self.local = local or LocalTraining()
        self.conduct = conduct or Conduct()
        self._progress: Progress = progress or (lambda *_: None)
        self._stop: Callable[[], bool] = stop or (lambda: False)

        self.work, self.skipped = prepare(clients, model, self.conduct.encoding)
        self.seen = [id for id, client in self.work.items() if client.seen]
        self._settings = self._round_settings()
        spec = self._fleet_spec()
        state = self.rule.init(spec)
        cohort = preflight.resolve_cohort(self.conduct.cohort, model, spec, self.local, self.work)
        self.engine = InProcess(model, self.work, self.local, cohort)
        self._scorer = Scorer(
            model, self.work, fleet, self._settings, self.conduct.evaluation, self._progress
        )

        self._temporary = None if out else tempfile.TemporaryDirectory(prefix="polyrank-")
        path = Path(out) if out else Path(self._temporary.name) / "run"  # type: ignore[union-attr]
        self.folder = RunFolder.open(path) if resume else RunFolder.create(path)
        try:
            for name, text in (attachments or {}).items():
                if not resume:
                    storage.write_text(self.folder.path / name, text)
            self._begin(state, spec, allow_inexact)
        except BaseException:
            self.folder.close()
            raise

    # --- before the first round ---

    def _round_settings(self) -> RoundSettings:
        without = [id for id in self.seen if id not in self.fleet.assigned]
        if without:
            raise RankError(f"fleet: no LoRA type for the clients {without[:10]}; assign one each")
        ranks = self.fleet.ranks(self.model.spec)
        examples = {id: len(self.work[id].rows["train"]) for id in self.seen}
        return RoundSettings(
            rule=self.rule,
            ranks={id: ranks[id] for id in self.seen},
            weights=self.conduct.weights.weights(examples),
            scaling=self.conduct.scaling,
            seed=self.conduct.seed,
            max_increment=self.conduct.faults.max_increment,
        )

    def _fleet_spec(self) -> FleetSpec:
        ranks = self._settings.ranks
        largest: dict[str, int] = {}
        for own in {id(own): own for own in ranks.values()}.values():
            for site, rank in own.items():
                largest[site] = max(rank, largest.get(site, 0))
        shapes = {site: self.model.spec.shapes[site] for site in largest}
        if self.conduct.server_rank is not None:
            largest = {s: min(self.conduct.server_rank, *shapes[s]) for s in largest}
        return FleetSpec(shapes, ranks, largest, self.conduct.seed)

    def _begin(self, state: State, spec: FleetSpec, allow_inexact: bool) -> None:
        fixed = {"rule": self.rule.name, "cohort": self.engine.cohort}
        now = surroundings.describe(self.model, fingerprint(self.work), fixed)
        file = self.folder.path / "run.json"
        if file.exists():
            before = storage.read_json(file)
            if self.conduct.cohort == "auto":  # Resolved once, stored with the run.
                self.engine.cohort = now["settings"]["cohort"] = before["settings"]["cohort"]
            surroundings.check_same(before, now, allow_inexact=allow_inexact)
        else:
            preflight.check_disk(self.folder.path, spec, self._round_size())
            storage.write_json(file, now)
            skipped = {"count": self.skipped.count, "rows": dict(self.skipped.rows)}
            storage.write_json(self.folder.path / "skipped.json", skipped)
        saved = self.folder.load_checkpoint()
        if saved is None:
            fresh = {"best_loss": None, "best_round": 0, "waited": 0, "stopped": None}
            saved = Checkpoint(0, state, fresh)
        self._at = saved
        self.folder.keep_records(saved.round)
        self.folder.clear_updates(before=saved.round + 1)

    def _round_size(self) -> int:
        return self.conduct.sampling.count(len(self.seen))

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
        return self._at.progress["stopped"]

    def rounds(self, until: int) -> Iterator[RoundRecord]:
        """Train up to round number `until`, yielding each finished round's record.

        Ends sooner by early stopping. Raises RoundFailedError if a round cannot be completed.
        """
        self.base()
        if self._at.round == 0 and self.folder.load_checkpoint() is None:
            self.folder.save_checkpoint(self._at)
        while self._at.round < until and self.stopped is None:
            yield self._one_round()

    def _one_round(self) -> RoundRecord:
        started = time.perf_counter()
        round = self._trained_round()
        trained = time.perf_counter()
        self._progress("merge", 0, 1)
        state, reports = round.aggregate(
            lambda client, site: self.folder.factors(round.number, round.attempt, client, site)
        )
        merged = time.perf_counter()
        self._progress("merge", 1, 1)
        scores = self._scorer.of_round(state, round.number)
        ended = time.perf_counter()
        receipts = [round.accepted[client] for client in sorted(round.accepted)]
        targets = sum(r.metrics["target_tokens"] for r in receipts)
        types = [self.fleet.assigned[client] for client in round.clients]
        record = RoundRecord(
            schema=SCHEMA,
            round=round.number,
            attempt=round.attempt,
            clients=list(round.clients),
            ranks={name: types.count(name) for name in sorted(set(types))},
            loss=sum(r.metrics["loss"] * r.metrics["target_tokens"] for r in receipts) / targets,
            tokens=int(sum(r.metrics["tokens"] for r in receipts)),
            bytes_down=sum(round.assignment(client).nbytes for client in round.clients),
            bytes_up=sum(r.nbytes for r in receipts),
            energy={site: [r.energy, r.discarded] for site, r in sorted(reports.items())},
            rejected=dict(sorted(round.rejected.items())),
            evaluation=scores,
            seconds={
                "train": trained - started,
                "merge": merged - trained,
                "evaluate": ended - merged,
                "total": ended - started,
            },
        )
        self.folder.append_record(record.to_json())
        self._at = self._advance(state, record)
        self.folder.save_checkpoint(self._at)
        self.folder.clear_updates(before=round.number + 1)
        return record

    def _trained_round(self) -> Round:
        number, conduct = self._at.round + 1, self.conduct
        reasons: dict[str, str] = {}
        for attempt in range(conduct.faults.attempts):
            seed = (conduct.seed, number, attempt, "sample")
            clients = sample_clients(self.seen, self._round_size(), *seed)
            round = Round(self._settings, self._at.state, number, attempt, clients)
            self._train(round)
            if len(round.accepted) >= conduct.faults.quorum * len(clients):
                return round
            reasons |= round.rejected
        listed = "\n  ".join(f"{client}: {why}" for client, why in sorted(reasons.items()))
        raise RoundFailedError(
            f"round {number}: fewer than {conduct.faults.quorum:.0%} of the updates were usable in "
            f"each of {conduct.faults.attempts} attempts; the state is that of round {number - 1}"
            f"\n  {listed}"
        )

    def _train(self, round: Round) -> None:
        """Train the round's clients, cohort by cohort; those persisted before a kill are read."""
        done, total = 0, len(round.clients)
        self._progress("train", 0, total)
        for cohort in self.engine.cohorts(round.clients):
            saved = [self.folder.load_update(round.number, round.attempt, c) for c in cohort]
            updates = iter(u for u in saved if u) if all(saved) else self._execute(round, cohort)
            for update in updates:
                try:
                    round.accept(update)
                except UpdateError:
                    continue  # Counted with its reason in round.rejected.
                finally:
                    done += 1
                    self._progress("train", done, total)
                self.folder.save_update(update)

    def _execute(self, round: Round, cohort: list[str]) -> Iterator[Any]:
        return self.engine.execute([round.task(client) for client in cohort], self._check_stop)

    def _check_stop(self) -> None:
        if self._stop():
            raise InterruptedRunError(
                f"stopped in round {self._at.round + 1}; rounds up to {self._at.round} and the "
                f"updates of finished clients are saved in {self.folder.path}"
            )

    def _advance(self, state: State, record: RoundRecord) -> Checkpoint:
        progress, best = dict(self._at.progress), self._at.best
        stopping, loss = self.conduct.stopping, record.validation_loss
        if stopping and loss is not None:
            known = progress["best_loss"]
            if known is None or loss < known - stopping.min_delta:
                progress |= {"best_loss": loss, "best_round": record.round, "waited": 0}
                best = state if stopping.restore_best else None
            else:
                progress["waited"] += 1
            if progress["waited"] >= stopping.patience:
                progress["stopped"] = (
                    f"no lower validation loss in {stopping.patience} evaluations since round "
                    f"{progress['best_round']}"
                )
        return Checkpoint(record.round, state, progress, best)

    # --- the result ---

    @property
    def result_state(self) -> State:
        """The rule's state that the result is read from: the best if early stopping kept one."""
        return self._at.best or self._at.state

    @property
    def adapter(self) -> GlobalAdapter:
        """The global adapter so far, at the server's rank."""
        return GlobalAdapter(self.rule.adapter(self.result_state), self.model, self.conduct.scaling)

    def base(self) -> Scores:
        """Return the bare base's scores on the test parts, measured once and kept."""
        file = self.folder.path / "base.json"
        if not file.exists():
            storage.write_json(file, self._scorer.of(None, "test", texts=True))
        return storage.read_json(file)

    def finish(self) -> dict[str, Any]:
        """Evaluate the result on the test parts, write adapter/ and summary.json, return it."""
        self._check_stop()
        final = self._scorer.of(self.adapter.factors, "test", texts=True)
        storage.write_json(self.folder.path / "evaluation.json", final)
        self.adapter.save(self.folder.path / "adapter", overwrite=True)
        restored = self._at.best is not None
        content = summary(
            method=self.rule.name,
            records=self.folder.records(),
            base=self.base(),
            final=final,
            target=self.conduct.target_loss,
            stopped=self.stopped,
            result_round=self._at.progress["best_round"] if restored else self._at.round,
        )
        storage.write_json(self.folder.path / "summary.json", content)
        return content

    def close(self) -> None:
        """Release the folder; a temporary one is removed."""
        self.folder.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
