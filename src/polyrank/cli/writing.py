"""Commands that write something to take away: export, app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.arguments import AllowCode, RecipeArgument, RunArgument
from polyrank.errors import FolderExistsError


def export(
    folder: RunArgument,
    target: Annotated[
        Path,
        typer.Argument(
            help="The folder to write, which must not exist.", metavar="FOLDER", show_default=False
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="The adapter's rank. Default: the server's.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write base and adapter as one model.")
    ] = False,
    allow_code: AllowCode = False,  # noqa: ARG001
) -> None:
    """Write a run's adapter at any rank, or merged into its base."""
    if merged and rank is not None:
        raise typer.BadParameter("give --rank or --merged, not both")
    if target.exists():
        raise FolderExistsError(f"{target}: exists already; choose another folder")
    from polyrank import report
    from polyrank.runner.inspect import adapter_of, look

    adapter = adapter_of(folder)
    run = look(folder)
    if not run.finished:
        typer.echo(f"{folder} is not finished: this is its adapter after round {run.result_round}")
    if merged:
        lost = adapter.save_merged(target)
        typer.echo(f"{target}: base and adapter as one model")
        typer.echo(
            f"rounding to {adapter.model.dtype} changed the update by {lost:.2g} of its norm"
        )
        return
    lost = adapter.save(target, rank=rank)
    if rank is not None or lost:
        kept = "the server's rank" if rank is None else f"rank {rank}"
        typer.echo(f"{kept} keeps {1 - lost:.3%} of the energy")
    typer.echo(report.loading(target))


def flower_app(
    recipe: RecipeArgument,
    folder: Annotated[
        Path,
        typer.Argument(
            help="The folder to write, which must not exist.", metavar="DIR", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the recipe, such as data.source=client, and to the app, such as "
            "app.out=/data/run.",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a recipe as a Flower app, to simulate, or to run on other machines."""
    from polyrank import config
    from polyrank.config.app import OWN, own_keys
    from polyrank.flower.app_folder import write_app

    given = overrides or []
    of_recipe = [override for override in given if not override.startswith(OWN)]
    of_app = own_keys([override for override in given if override.startswith(OWN)])
    written = write_app(config.read(recipe, of_recipe), folder, own=of_app)
    typer.echo(f"{folder}: a Flower app")
    for line in (*written.notes, *written.next):
        typer.echo(line)
