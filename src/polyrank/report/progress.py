"""A run as it goes on: its set-up, a line a round, and how far the present phase is."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polyrank import report
from polyrank.report.heartbeat import SECONDS, Heartbeat
from polyrank.run import RoundRecord, Run

_NAMES = {"train": "training", "evaluate": "evaluating", "merge": "aggregating"}
_TRAINING = 0.9
"""The share of a round that training is taken to be, for the time that is left."""


class RunProgress:
    """Shows runs on a console: a bar on a terminal, elsewhere a line at least every half minute.

    See `polyrank.runner.runner.Listener`. Give it stderr, so that stdout stays for results.
    """

    def __init__(self, console: Console, seconds: float = SECONDS):
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(24),
            TextColumn("round {task.fields[round]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=1e9,  # Rounds may be long: the time left is that of all so far.
        )
        self._task = self._bar.add_task("", visible=False, round="")
        self._heartbeat = Heartbeat(console, self._status, seconds)
        self._phase, self._count, self._since = "", "", time.monotonic()
        self._finished, self._total = 0, 0
        self._run: Run | None = None
        self._wire = False

    def __enter__(self) -> RunProgress:
        self._bar.start()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.stop()
        self._bar.stop()

    def loading(self, what: str) -> None:
        """Tell what is being loaded."""
        self._enter(f"loading {what}")
        self._bar.reset(self._task, description=f"loading {what}", visible=True, round="–")

    def begun(self, title: str, run: Run, rounds: int) -> None:
        """Print the set-up and start the bar."""
        unseen = sum(not client.seen for client in run.work.values())
        self._say(f"[bold]{title}[/bold] in {run.folder.path}", soft_wrap=True)
        clients = len(run.work) - unseen
        if run.settings.pooled:
            self._say(f"pooled: the training examples of all {clients} clients in one place")
        cohort = run.engine.cohort
        self._say(
            f"{clients} clients and {unseen} unseen, "
            f"{len(run.model.spec.sites)} adapted matrices"
            f"{f', {cohort} clients in one pass' if cohort > 1 else ''}",
        )
        if run.skipped.count:
            reasons = ", ".join(f"{len(r)} {why}" for why, r in run.skipped.rows.items())
            self._say(f"not used: {reasons} (named in skipped.json)", markup=False)
        self._say_ranks(run)
        fleet = run.fleet
        cuts = [fleet.cuts[name] for name in fleet.possible if name in fleet.cuts]
        leaks = report.leaks(cuts, run.settings.split)
        if leaks is not None:
            self._say(leaks, style="yellow", markup=False)
        self._wire, self._run = bool(cuts), run
        for note in run.folder.notes:
            self._say(note, style="yellow", markup=False)
        if run.round:
            self._say(f"going on after round {run.round}")
        if run.round < rounds:
            self._say(report.round_legend(), style="dim", markup=False)
            self._say(report.round_header(self._wire), style="bold", markup=False)
        self._finished, self._total = run.round, rounds
        self._enter("evaluating")
        self._bar.reset(
            self._task,
            description="evaluating",
            completed=self._finished,
            total=rounds,
            visible=True,
            round=self._place(),
        )

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar within a round."""
        name = _NAMES.get(phase, phase)
        self._enter(name)
        if phase != "train":
            self._bar.update(self._task, description=name)
            return
        self._count = f"{done} of {total} clients"
        self._bar.update(
            self._task,
            description=f"{name} {done}/{total} clients",
            completed=self._finished + _TRAINING * done / max(1, total),
        )

    def round(self, record: RoundRecord) -> None:
        """Print a round's line."""
        self._say(report.round_line(record, self._wire), markup=False)
        measured = report.perplexity(record)
        if measured is not None:
            self._say(f"  {measured}")
        for line in report.remarks(record):
            self._say(f"  {line}", style="yellow", markup=False)
        if record.planned_anew and self._run is not None:
            self._say("  importance has moved: planned anew")
            self._say_ranks(self._run)
        self._finished = record.round
        self._bar.update(self._task, completed=record.round, round=self._place())

    def _say_ranks(self, run: Run) -> None:
        """Print who has which ranks, and runs which blocks."""
        fleet, spec = run.fleet, run.model.spec
        by_type = {fleet.assigned[id]: run.ranks[id] for id in run.seen}
        types = [fleet.assigned[id] for id in run.seen]
        counts = {name: types.count(name) for name in sorted(set(types))}
        cuts = {name: fleet.cuts[name] for name in fleet.possible if name in fleet.cuts}
        self._say(report.ranks(counts, by_type, cuts, spec.blocks))

    def _say(self, what: RenderableType, **options: Any) -> None:
        self.console.print(what, highlight=False, **options)
        self._heartbeat.printed()

    def _enter(self, phase: str) -> None:
        """Note which phase the run is in, and since when."""
        if phase != self._phase:
            self._phase, self._count, self._since = phase, "", time.monotonic()

    def _status(self) -> str:
        """The present phase in a line, such as ``round 3/20: training, 5 of 20 clients, 92 s``."""
        seconds = f"{time.monotonic() - self._since:.0f} s"
        where = f"round {self._place()}: " if self._total else ""
        told = ", ".join(part for part in (self._phase, self._count, seconds) if part)
        return f"{where}{told}" if self._phase else ""

    def _place(self) -> str:
        return f"{min(self._finished + 1, self._total)}/{self._total}"
