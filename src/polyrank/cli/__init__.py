"""The command line. Commands import what they need when they run, so that help comes at once."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli import looking, training, writing
from polyrank.cli.arguments import examples
from polyrank.errors import InterruptedRunError, PolyrankError

INTERRUPTED = 130
"""Exit code of a run that was asked to stop (128 + SIGINT)."""

app = typer.Typer(
    name="polyrank",
    help="Fine-tune one language model together on machines that are not equal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import polyrank

        typer.echo(f"polyrank {polyrank.__version__}")
        raise typer.Exit


@app.callback()
def polyrank(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fine-tune one language model together on machines that are not equal."""


_COMMANDS = (
    (
        "run",
        training.run,
        "polyrank run quickstart",
        "polyrank run split rounds=4 aggregation.rule=flexlora --out runs/short",
        "polyrank run quickstart --control weakest",
    ),
    (
        "init",
        writing.init,
        "polyrank init my.toml --model Qwen/Qwen3-0.6B --data notes.jsonl --clients 6",
        "polyrank init my.toml --data notes.csv --by hospital",
    ),
    (
        "check",
        looking.check,
        "polyrank check quickstart",
        "polyrank check split --json",
    ),
    (
        "plan",
        looking.plan,
        "polyrank plan my.toml",
        "polyrank plan my.toml plan.seconds=60",
    ),
    (
        "compare",
        training.compare,
        "polyrank compare quickstart --rules flexlora,fedit,hetlora --seeds 5",
    ),
    ("resume", training.resume, "polyrank resume runs/quickstart"),
    (
        "inspect",
        looking.inspect,
        "polyrank inspect runs/quickstart",
        "polyrank inspect runs/quickstart --sites",
    ),
    (
        "export",
        writing.export,
        "polyrank export runs/quickstart adapter-8 --rank 8",
        "polyrank export runs/quickstart model --merged",
    ),
    (
        "app",
        writing.flower_app,
        "polyrank app quickstart quickstart-app",
        "polyrank app quickstart quickstart-app rounds=2 data.source=client",
    ),
    (
        "profile",
        looking.profile,
        'polyrank profile --name laptop --up "20 Mbit/s" --down "100 Mbit/s"',
    ),
)

for _name, _command, *_lines in _COMMANDS:
    app.command(_name, epilog=examples(*_lines))(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0; 1 after a PolyrankError; 2 wrong usage; 130 stopped.

    A letter that the output's encoding lacks is written as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A test's or a notebook's may be another.
            stream.reconfigure(errors="replace")
    console = Console(stderr=True, highlight=False)
    try:
        app(arguments, prog_name="polyrank")
    except InterruptedRunError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(INTERRUPTED)
    except (PolyrankError, OSError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
