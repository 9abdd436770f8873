"""Commands that write files: init, export, app."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.arguments import AllowCode, RecipeArgument, RunArgument
from polyrank.errors import FolderExistsError


def init(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="The file to write, which must not exist.", metavar="RECIPE", show_default=False
        ),
    ],
    model: Annotated[
        str, typer.Option(help="A folder or a hub id; sample: the embedded miniature.")
    ] = "sample",
    data: Annotated[
        str, typer.Option(help="JSON lines, CSV, another source, or sample: the embedded tasks.")
    ] = "sample",
    clients: Annotated[
        int | None, typer.Option(min=1, help="How many clients get equal shares of the rows.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="The column whose values are the clients, instead.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The column of prompts. Default: told by its name.")
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="The column of answers. Default: told by its name.")
    ] = None,
) -> None:
    """Write a commented recipe for a model, data and a number of clients, which runs as it is."""
    from polyrank.runner.new_recipe import write_recipe

    made = write_recipe(
        recipe,
        model=model,
        data=data,
        clients=clients,
        by=by,
        prompt=prompt,
        completion=completion,
    )
    for note in made.notes:
        typer.echo(note)
    typer.echo(f"{made.path}: look it through with polyrank check {made.path}, then run it:")
    typer.echo(f"polyrank run {made.path}")


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
        largest = max(adapter.factors.ranks.values(), default=0)
        if rank is not None and rank > largest:
            typer.echo(
                f"rank {rank} was asked for; the run's largest is {largest}: written as it is"
            )
        saved_rank = "the server's rank" if rank is None else f"rank {min(rank, largest)}"
        typer.echo(f"{saved_rank} keeps {1 - lost:.3%} of the energy")
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
    from polyrank.aggregation import code_allowed
    from polyrank.config.app import ALLOW_CODE, OWN, own_keys
    from polyrank.flower.app_folder import write_app

    given = overrides or []
    of_recipe = [override for override in given if not override.startswith(OWN)]
    of_app = own_keys([override for override in given if override.startswith(OWN)])
    code = of_app[ALLOW_CODE]
    with code_allowed(str(code)) if code else nullcontext():
        written = write_app(config.read(recipe, of_recipe), folder, own=of_app)
    typer.echo(f"{folder}: a Flower app")
    for line in (*written.notes, *written.next):
        typer.echo(line)
