"""Commands that train nothing: check, plan, inspect, profile."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from polyrank.cli.arguments import (
    AllowCode,
    AsJson,
    Overrides,
    RecipeArgument,
    RunArgument,
    print_json,
)
from polyrank.cli.interrupts import followed


def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Read a recipe's data and tell what a run would do; train nothing.

    Clients, tokens, the rows that are left out and why, ranks, memory and time. What would stop the
    run is an error here too.
    """
    from polyrank import config

    read = config.read(recipe, overrides or [])
    with followed() as invocation:
        from polyrank.runner.check import check as checked

        result = checked(read, invocation)
    if as_json:
        print_json(result.to_json())
    else:
        from polyrank.report.check import page

        console = stdout()
        for part in page(result):
            console.print(part)
    if not result.can_run:
        raise typer.Exit(1)


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Tell what each device would train, what that costs, and who cannot take part."""
    from polyrank import config

    read = config.read(recipe, overrides or [])
    from polyrank.runner.plans import preview

    plans = preview(read)
    if as_json:
        print_json(plans.to_json())
    else:
        from polyrank.report.plans import page

        console = stdout()
        for part in page(plans):
            console.print(part)
    if not plans.feasible:
        raise typer.Exit(1)


def inspect(
    folder: RunArgument,
    sites: Annotated[
        bool,
        typer.Option("--sites", help="Also a line for each adapted matrix: rank, spectrum, loss."),
    ] = False,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Show a run's ranks and rounds and where its update is; also while it goes on."""
    from polyrank.runner.inspect import look

    run = look(folder)
    if as_json:
        print_json(run.to_json())
        return
    from polyrank.report.inspection import page

    console = stdout()
    for part in page(run, sites=sites):
        console.print(part)


def profile(
    name: Annotated[
        str, typer.Option(help="The device's name in the recipe.", metavar="NAME")
    ] = "this-machine",
    device: Annotated[str, typer.Option(help="cpu or cuda.", metavar="DEVICE")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="The rate to write: float32 or bfloat16.", metavar="DTYPE")
    ] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    up: Annotated[
        str | None,
        typer.Option(help='The link to the server, e.g. "20 Mbit/s".', metavar="RATE"),
    ] = None,
    down: Annotated[
        str | None,
        typer.Option(help='The link from the server, e.g. "100 Mbit/s".', metavar="RATE"),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help='The delay one way, e.g. "30 ms".', metavar="TIME")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, and print it as a device that a recipe takes."""
    from polyrank.runner.measure_device import measure

    measured = measure(
        name, device=device, dtype=dtype, threads=threads, up=up, down=down, latency=latency
    )
    for remark in measured.remarks:
        typer.echo(remark, err=True)
    if as_json:
        print_json(measured.json)
    else:
        typer.echo(measured.toml.rstrip())


def stdout() -> Console:
    """Return a console of stdout: as wide as the terminal, 80 columns where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 80)
