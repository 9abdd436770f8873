"""A run on the terminal: its set-up, a line a round, progress with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polyrank import report
from polyrank.run import RoundRecord, Run

_NAMES = {"train": "training", "evaluate": "evaluating", "merge": "merging"}
_TRAINING = 0.9
"""The share of a round that training is taken to be, for the time that is left."""


class Terminal:
    """Follows runs on a console; bars only on a terminal. See `polyrank.runner.runner.Listener`.

    Write to stderr, so that stdout stays for results.
    """

    def __init__(self, console: Console):
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
        self._finished, self._total = 0, 0
        self._run: Run | None = None
        self._wire = False

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def loading(self, what: str) -> None:
        """Tell what is being loaded."""
        self._bar.reset(self._task, description=f"loading {what}", visible=True, round="–")

    def begun(self, title: str, run: Run, rounds: int) -> None:
        """Print the set-up and start the bar."""
        say = self.console.print
        unseen = sum(not client.seen for client in run.work.values())
        say(f"[bold]{title}[/bold] in {run.folder.path}", soft_wrap=True, highlight=False)
        clients = len(run.work) - unseen
        if run.settings.pooled:
            say(f"pooled: the training examples of all {clients} clients in one place")
        cohort = run.engine.cohort
        say(
            f"{clients} clients and {unseen} unseen, "
            f"{len(run.model.spec.sites)} adapted matrices"
            f"{f', {cohort} clients in one pass' if cohort > 1 else ''}",
            highlight=False,
        )
        if run.skipped.count:
            reasons = ", ".join(f"{len(r)} {why}" for why, r in run.skipped.rows.items())
            say(f"not used: {reasons} (named in skipped.json)", markup=False, highlight=False)
        self._say_ranks(run)
        fleet = run.fleet
        cuts = [fleet.cuts[name] for name in fleet.possible if name in fleet.cuts]
        told = report.leaks(cuts, run.settings.split)
        if told is not None:
            say(told, style="yellow", markup=False, highlight=False)
        self._wire, self._run = bool(cuts), run
        for note in run.folder.notes:
            say(note, style="yellow", markup=False)
        if run.round:
            say(f"going on after round {run.round}", highlight=False)
        if run.round < rounds:
            say(report.round_header(self._wire), style="bold", highlight=False)
        self._finished, self._total = run.round, rounds
        self._bar.reset(
            self._task,
            description="evaluating",
            completed=self._finished,
            total=rounds,
            visible=True,
            round=self._place(),
        )

    def _say_ranks(self, run: Run) -> None:
        """Print who has which ranks, and runs which blocks."""
        fleet, spec = run.fleet, run.model.spec
        by_type = {fleet.assigned[id]: run.ranks[id] for id in run.seen}
        types = [fleet.assigned[id] for id in run.seen]
        counts = {name: types.count(name) for name in sorted(set(types))}
        cuts = {name: fleet.cuts[name] for name in fleet.possible if name in fleet.cuts}
        self.console.print(report.ranks(counts, by_type, cuts, spec.blocks))

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar within a round."""
        name = _NAMES.get(phase, phase)
        if phase != "train":
            self._bar.update(self._task, description=name)
            return
        self._bar.update(
            self._task,
            description=f"{name} {done}/{total} clients",
            completed=self._finished + _TRAINING * done / max(1, total),
        )

    def round(self, record: RoundRecord) -> None:
        """Print a round's line."""
        self.console.print(report.round_line(record, self._wire), highlight=False)
        measured = report.perplexity(record)
        if measured is not None:
            self.console.print(f"  {measured}", highlight=False)
        for line in report.remarks(record):
            self.console.print(f"  {line}", style="yellow", markup=False)
        if record.planned_anew and self._run is not None:
            self.console.print("  importance has moved: planned anew", highlight=False)
            self._say_ranks(self._run)
        self._finished = record.round
        self._bar.update(self._task, completed=record.round, round=self._place())

    def _place(self) -> str:
        return f"{min(self._finished + 1, self._total)}/{self._total}"
