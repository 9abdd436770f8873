"""A comparison carried out: seed by seed, method by method, each run in a folder of its own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from polyrank.compare.method import Method
from polyrank.compare.request import FILE, Request
from polyrank.compare.tuning import EXTENSIONS, Trial, best, next_rate
from polyrank.errors import (
    FactorError,
    FolderInUseError,
    InterruptedRunError,
    PolyrankError,
    RoundFailedError,
    RuleError,
    UpdateError,
)
from polyrank.run import RoundRecord, RunFolder, storage
from polyrank.run.folder import SUMMARY
from polyrank.run.run import BASE
from polyrank.runner.parts import Invocation, Listener, LocalParts
from polyrank.runner.runner import (
    complete,
    resumable,
    train,
)

FAILURE = "failure.json"
"""In the folder of a run that diverged: why. Such a run is not tried again."""

_DIVERGED = (RoundFailedError, RuleError, FactorError, UpdateError, torch.linalg.LinAlgError)
"""What comes of numbers that grew too large, once a run has begun: it would come again."""


class ComparisonListener(Listener, Protocol):
    """Someone who follows a comparison."""

    def next_run(self, number: int, total: int, title: str) -> None:
        """Tell that a run comes next, out of so many as far as it is known."""
        ...

    def run_done(self, result: str, *, anew: bool) -> None:
        """Tell how that run ended; `anew` is False where it was finished before."""
        ...


@dataclass(frozen=True)
class SeedRun:
    """One method with one seed at its rate: where it lies, and why it failed, if it did."""

    seed: int
    folder: Path
    failure: str | None = None

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.failure is None and (self.folder / SUMMARY).is_file()


@dataclass
class MethodRuns:
    """How far a method is: the trials of its rates, the rate chosen, and its runs."""

    method: Method
    rate: float | None = None
    trials: list[Trial] = field(default_factory=list)
    runs: list[SeedRun] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


class Comparison:
    """A request in a folder, which is locked while it is carried out.

    `methods` say how far each method is; `after_run` is called after each run. `finished_before`
    holds until a run is begun or gone on with.
    """

    def __init__(
        self, request: Request, folder: Path, invocation: Invocation, listener: ComparisonListener
    ):
        self.request, self.folder = request, folder
        self._invocation, self._listener = invocation, listener
        self._root = LocalParts(request.recipe, invocation)
        self.methods = [MethodRuns(method) for method in request.methods]
        self.finished_before = True
        self._number = 0
        tried = len(self.methods) * len(request.rates)
        self._total = tried + len(self.methods) * (request.seeds - 1)

    def carry_out(self, after_run: Callable[[], object]) -> None:
        """Carry out all runs that are not finished; a failure of one does not end the others."""
        torch.set_num_threads(self.request.recipe.engine.threads)
        with resumable(self.folder, self.folder / FILE):
            if not (self.folder / FILE).is_file():  # What cannot be loaded leaves no folder.
                self._load(self._root)
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                self.request.save(self.folder)
                for place, seed in enumerate(self.request.seed_values):
                    self._seed(seed, first=place == 0, after_run=after_run)

    def _seed(self, seed: int, *, first: bool, after_run: Callable[[], object]) -> None:
        recipe = replace(self.request.recipe, seed=seed)
        parts = self._root if first else self._root.of(recipe)
        for method_runs in self.methods:
            if first:
                method_runs.rate = self._choose(method_runs, seed, parts, after_run)
            if method_runs.rate is None:
                continue
            if not (first and self.request.tune):  # Otherwise it was told of when it was tried.
                self._announce(method_runs.method, method_runs.rate, seed)
            method_runs.runs.append(self._finish(method_runs, method_runs.rate, seed, parts))
            after_run()

    # --- rates ---

    def _choose(
        self, method_runs: MethodRuns, seed: int, parts: LocalParts, after_run: Callable[[], object]
    ) -> float | None:
        """Return the method's rate, the best of its grid; None if none of them led anywhere."""
        if not self.request.tune:
            return self.request.rates[0]
        rates = [*self.request.rates]
        for rate in rates:  # It grows while its edge is best.
            method_runs.trials.append(self._try(method_runs, rate, seed, parts))
            after_run()
            extended = len(rates) - len(self.request.rates)
            if (
                len(method_runs.trials) == len(rates)
                and extended < EXTENSIONS
                and not method_runs.failures
            ):
                further = next_rate(method_runs.trials)
                if further is not None:
                    rates.append(further)
                    self._total += 1
        chosen = best(method_runs.trials)
        if chosen is None and not method_runs.failures:
            reason = "no rate of the grid gave a validation loss"
            method_runs.failures.append({"rate": None, "seed": seed, "reason": reason})
        if (
            chosen is None or method_runs.failures
        ):  # Not from a grid of which a part could not be tried.
            self._total -= self.request.seeds - 1
            return None
        return chosen.rate

    def _try(self, method_runs: MethodRuns, rate: float, seed: int, parts: LocalParts) -> Trial:
        """Train at one rate, without looking at the test parts, and read the validation loss."""
        folder = self._announce(method_runs.method, rate, seed)
        recipe = method_runs.method.recipe(self.request.recipe, rate=rate, seed=seed)
        title = _title(method_runs.method, rate, seed)

        def work() -> None:
            with train(
                recipe, folder, self._invocation, parts, resume=folder.exists(), title=title
            ):
                pass

        trained = (folder / FAILURE).is_file() or _trained(folder, recipe.rounds)
        failure = self._guarded(folder, seed, None if trained else work, parts)
        if failure is not None:
            if not (folder / FAILURE).is_file():  # A rate that diverges is an answer, this is none.
                method_runs.failures.append({"rate": rate, "seed": seed, "reason": failure})
            trial = Trial(rate, None, None, failure)
        else:
            record = _last_evaluated(folder)
            loss = record.validation_loss if record else None
            why = None if loss is not None else "no finite validation loss"
            trial = Trial(rate, loss, record.round if record else None, why)
        told = _short(trial.failure) or f"validation {trial.loss:.4f} after round {trial.round}"
        self._listener.run_done(told, anew=not trained)
        return trial

    # --- runs ---

    def _finish(
        self, method_runs: MethodRuns, rate: float, seed: int, parts: LocalParts
    ) -> SeedRun:
        """Carry out a run to its summary, whatever of it is there already."""
        folder = self._place(method_runs.method, rate, seed)
        recipe = method_runs.method.recipe(self.request.recipe, rate=rate, seed=seed)
        title = _title(method_runs.method, rate, seed)
        alone = not (self.request.tune and seed == self.request.recipe.seed)

        def work() -> None:
            complete(recipe, folder, self._invocation, parts, resume=folder.exists(), title=title)

        finished = any((folder / name).is_file() for name in (SUMMARY, FAILURE))
        failure = self._guarded(folder, seed, None if finished else work, parts)
        run = SeedRun(seed, folder, failure)
        if failure is not None:
            method_runs.failures.append({"rate": rate, "seed": seed, "reason": failure})
            told = _short(failure)
        else:
            loss = storage.read_json(folder / SUMMARY)["final"]["seen"]["loss"]
            told = "loss not finite" if loss is None else f"test loss {loss:.4f}"
        if alone:
            self._listener.run_done(told, anew=not finished)
        return run

    def _guarded(
        self, folder: Path, seed: int, work: Callable[[], None] | None, parts: LocalParts
    ) -> str | None:
        """Do the work, if there is any left, and return why it failed, or None."""
        if (folder / FAILURE).is_file():
            return storage.read_json(folder / FAILURE)["reason"]
        if work is None:
            return None
        self.finished_before = False
        self._load(parts)
        self._find_base(parts, seed)
        try:
            work()
        except (InterruptedRunError, FolderInUseError):
            raise
        except (PolyrankError, torch.linalg.LinAlgError) as error:
            reason = str(error)
            if isinstance(error, _DIVERGED) and folder.exists():
                storage.write_json(
                    folder / FAILURE,
                    {"schema": 1, "error": type(error).__name__, "reason": reason},
                )
            return reason
        return None

    def _load(self, parts: LocalParts) -> None:
        """Load data, fleet and model; what fails here would fail in every run."""
        _ = parts.fleet, parts.model

    def _find_base(self, parts: LocalParts, seed: int) -> None:
        """Take the base's evaluation over from a run of this seed, also of another method."""
        if parts.base is None:
            for file in sorted(self.folder.glob(f"*/lr-*/seed-{seed}/{BASE}")):
                parts.base = file.read_text(encoding="utf-8")
                return

    def _place(self, method: Method, rate: float, seed: int) -> Path:
        return self.folder / method.slug / f"lr-{rate!r}" / f"seed-{seed}"

    def _announce(self, method: Method, rate: float, seed: int) -> Path:
        """Tell that this run comes next; return its folder."""
        self._number += 1
        self._listener.next_run(self._number, self._total, _title(method, rate, seed))
        return self._place(method, rate, seed)


def _title(method: Method, rate: float, seed: int) -> str:
    return f"{method.label}, rate {rate:g}, seed {seed}"


def _short(failure: str | None) -> str:
    return f"failed: {failure.splitlines()[0]}" if failure else ""


def _trained(folder: Path, rounds: int) -> bool:
    """Whether all rounds of the run in this folder are done, or it stopped early."""
    if not folder.exists():
        return False
    saved = RunFolder.peek(folder).load_checkpoint()
    return saved.round >= rounds or saved.progress.stopped is not None


def _last_evaluated(folder: Path) -> RoundRecord | None:
    """The record of the last round that was evaluated."""
    records = map(RoundRecord.from_json, RunFolder.peek(folder).records())
    evaluated = [record for record in records if record.evaluation is not None]
    return evaluated[-1] if evaluated else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a comparison's folder; FolderInUseError if another process does."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(
                f"{folder}: another process carries out this comparison; wait for it or stop it"
            ) from None
        yield
    finally:
        os.close(lock)
