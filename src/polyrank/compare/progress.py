"""A comparison as it goes on: a line a run, and how far the present run is."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from polyrank import report
from polyrank.report.heartbeat import SECONDS, Heartbeat
from polyrank.run import RoundRecord, Run

_EVALUATIONS = 0.2
"""The share of a run that base and final evaluation are taken to be, for the time that is left."""


class ComparisonProgress:
    """Shows a comparison: a bar on a terminal, elsewhere a line at least every half minute.

    See `polyrank.compare.run.ComparisonListener`. The time that is left is that of the runs to
    come, at the mean of those so far.
    """

    def __init__(self, console: Console, seconds: float = SECONDS):
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.fields[place]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", visible=False, place="")
        self._heartbeat = Heartbeat(console, self._status, seconds)
        self._number, self._total, self._title = 0, 1, ""
        self._rounds, self._done, self._share = 1, 0, 0.0
        self._finished, self._seconds, self._began = 0, 0.0, time.monotonic()
        self._before = 0

    def __enter__(self) -> ComparisonProgress:
        self._bar.start()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.stop()
        self._bar.stop()
        self._tell_before()

    def next_run(self, number: int, total: int, title: str) -> None:
        """Show which run comes next."""
        self._number, self._total, self._title = number, total, title
        self._done, self._share, self._began = 0, 0.0, time.monotonic()
        self._show("")

    def run_done(self, result: str, *, anew: bool) -> None:
        """Print a run's line."""
        if not anew:
            self._before += 1
            return
        self._tell_before()
        spent = time.monotonic() - self._began
        self._finished += 1
        self._seconds += spent
        self._say(
            f"{self._number}/{self._total}  {self._title}: {result}  ({report.duration(spent)})"
        )

    def _tell_before(self) -> None:
        if self._before:
            self._say(f"{report.count(self._before, 'run')} finished before")
        self._before = 0

    def loading(self, what: str) -> None:
        """Tell what is being loaded."""
        self._show(f"loading {what}")

    def begun(self, title: str, run: Run, rounds: int) -> None:
        """Print what the folder of a run has to tell."""
        for note in run.folder.notes:
            self._say(f"{title}: {note}", style="yellow")
        self._title, self._rounds, self._done = title, rounds, run.round
        self._show("")

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar within a round."""
        if phase == "train":
            self._share = (self._done + done / max(1, total)) / self._rounds
        self._show("")

    def round(self, record: RoundRecord) -> None:
        """Move the bar; the round's line can be read with `polyrank inspect`."""
        self._done = record.round
        self._share = record.round / self._rounds
        self._show("")

    def _say(self, text: str, **options: Any) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True, **options)
        self._heartbeat.printed()

    def _status(self) -> str:
        """The present run in a line, such as ``run 2/6, round 3/20, 41 s: fedit, seed 1``."""
        if not self._number:
            return ""
        spent = time.monotonic() - self._began
        place = f"{min(self._done + 1, self._rounds)}/{self._rounds}"
        return f"run {self._number}/{self._total}, round {place}, {spent:.0f} s: {self._title}"

    def _show(self, what: str) -> None:
        share = (1 - _EVALUATIONS) * self._share
        place = f"run {self._number}/{self._total}, round {min(self._done + 1, self._rounds)}"
        done = self._finished + share
        spent = self._seconds + time.monotonic() - self._began
        left = (self._total - self._number + 1 - share) * spent / done if done > 0.1 else None
        if left is not None:
            place += f"/{self._rounds}, about {report.duration(left)} left"
        self._bar.update(
            self._task,
            description=what or self._title,
            completed=max(0, self._number - 1) + share,
            total=self._total,
            place=place,
            visible=True,
        )
