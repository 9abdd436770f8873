"""The command line."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polyrank import config, report, runner
from polyrank.errors import InterruptedRunError, PolyrankError
from polyrank.federation import Federation, RoundRecord, RunFolder

app = typer.Typer(
    help="Fine-tune one language model together on machines that are not equal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
error_console = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Changes to the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


class Terminal:
    """Shows a run's progress on the terminal (on stderr, so that stdout stays for results)."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        self._rounds = self.bar.add_task("rounds", visible=False)
        self._phase = self.bar.add_task("", visible=False)

    def begun(self, title: str, federation: Federation, rounds: int) -> None:
        """Print the set-up and show the bar of rounds."""
        by_type = {federation.fleet.assigned[id]: federation.ranks[id] for id in federation.seen}
        unseen = len(federation.work) - len(federation.seen)
        self.console.print(
            f"[bold]{title}[/bold]: {len(federation.seen)} clients, {unseen} unseen, "
            f"{len(federation.model.spec.sites)} sites, {federation.engine.cohort} clients in one "
            f"pass; in {federation.folder.path}"
        )
        if federation.skipped.count:
            reasons = ", ".join(f"{len(r)} {why}" for why, r in federation.skipped.rows.items())
            self.console.print(f"skipped: {reasons}; named in skipped.json")
        self.console.print(report.ranks(federation.fleet.counts(), by_type))
        for note in federation.folder.notes:
            self.console.print(f"[yellow]{note}[/yellow]")
        if federation.round:
            self.console.print(f"going on after round {federation.round}")
        self.bar.update(
            self._rounds, completed=federation.round, total=rounds, visible=True, refresh=True
        )

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar of the phase."""
        self.bar.update(self._phase, description=phase, completed=done, total=total, visible=True)

    def round(self, record: RoundRecord) -> None:
        """Print a line and move the bar of rounds."""
        self.console.print(str(record))
        for client, why in record.rejected.items():
            self.console.print(f"[yellow]  rejected {client}: {why}[/yellow]")
        self.bar.update(self._rounds, completed=record.round)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; the second one ends at once."""
    wish = threading.Event()

    def note(*_: Any) -> None:
        if wish.is_set():
            raise KeyboardInterrupt
        wish.set()
        error_console.print("stopping after this step; once more to end at once")

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; must not exist.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Also run the homogeneous control: weakest, or a type.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry out a recipe: train, evaluate, and write a PEFT adapter."""
    changes = list(overrides or [])
    if control is not None:
        changes.append(f"control={json.dumps(control)}")
    read = config.read(recipe, changes)
    folder = out or _free(Path("runs") / read.name)
    with stopping() as wish, _terminal() as terminal:
        outcome = runner.start(read, folder, runner.Attendance(terminal, wish.is_set))
    _show(outcome, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    allow_inexact: Annotated[
        bool, typer.Option(help="Go on in other surroundings; the bytes may differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped or killed."""
    with stopping() as wish, _terminal() as terminal:
        attendance = runner.Attendance(terminal, wish.is_set, allow_inexact)
        outcome = runner.resume(folder, attendance)
    _show(outcome, as_json)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    merged: Annotated[bool, typer.Option(help="Write base and adapter as one model.")] = False,
) -> None:
    """Write a run's adapter at any rank, or merged into its base."""
    if merged and rank is not None:
        raise typer.BadParameter("give --rank or --merged, not both")
    adapter = runner.opened(folder)
    if merged:
        adapter.save_merged(target)
        typer.echo(f"{target}: the merged model")
    else:
        lost = adapter.save(target, rank=rank)
        typer.echo(f"{target}: PEFT adapter, {lost:.3%} of the energy discarded")


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Show a run's rounds, ranks, spectra and discarded energy."""
    console = Console()
    records = [RoundRecord(**record) for record in RunFolder.peek(folder).records()]
    console.print(report.rounds(records))
    factors = runner.opened(folder).factors
    console.print(report.spectra(factors, records[-1] if records else None))


def _free(path: Path) -> Path:
    """Return the path, or the first path-2, path-3, … that does not exist."""
    candidates = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


@contextmanager
def _terminal() -> Iterator[Terminal]:
    terminal = Terminal(error_console)
    with terminal.bar:
        yield terminal


def _show(outcome: runner.Outcome, as_json: bool) -> None:
    summary, control = outcome.summary, outcome.control
    if as_json:
        content = dict(summary) if control is None else {**summary, "control": control}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    columns = {"base": summary["base"], summary["method"]: summary["final"]}
    if control is not None:
        columns["control"] = control["final"]
    console = Console()
    console.print(report.scores("before and after, on the test parts", columns))
    console.print(report.categories(summary))
    console.print(f"adapter: {outcome.folder / 'adapter'}")


def main() -> None:
    """Run the command line; a PolyrankError becomes a message and exit code 1."""
    try:
        app()
    except InterruptedRunError as error:
        error_console.print(f"{error}", markup=False)
        sys.exit(130)
    except PolyrankError as error:
        error_console.print(f"[red]error[/red]: {type(error).__name__}", end=": ")
        error_console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
