"""Commands that train: run, compare, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyrank.cli.arguments import AllowCode, AsJson, Overrides, RecipeArgument, RunArgument
from polyrank.cli.interrupts import followed, followed_comparison


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder, which must not exist. Default: runs/NAME, or NAME-2 and so on.",
            metavar="FOLDER",
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="Also run the homogeneous control, all clients of one type: weakest, or a type.",
            metavar="TYPE",
        ),
    ] = None,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Carry out a recipe: train, evaluate, and write a PEFT adapter."""
    from polyrank import config

    forced = [] if control is None else [f"control={json.dumps(control)}"]
    read = config.read(recipe, [*(overrides or []), *forced])
    with followed() as invocation:
        from polyrank.report.console import show
        from polyrank.run.folder import unused
        from polyrank.runner import runner

        outcome = runner.start(read, out or unused(Path("runs") / read.name), invocation)
    show(outcome, as_json)


def compare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rules: Annotated[
        str,
        typer.Option(
            help="Rules by name, with commas between them; the others are compared with the "
            "first. RULE+METHOD sets local.method too. Baselines: splitlora, cenlora, ft, fedlora.",
            metavar="RULE,RULE,…",
        ),
    ] = "flexlora,flexlora:delta,fedit",
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds: the recipe's and those after it.")
    ] = 3,
    control: Annotated[
        str | None,
        typer.Option(
            help="Also the first rule with all clients of one type: weakest, or a type.",
            metavar="TYPE",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Choose each method's rate by validation loss, first seed."),
    ] = False,
    rates: Annotated[
        str | None,
        typer.Option(
            help="With --tune: rates to try. Default: local.lr times 1/3, 1 and 3.",
            metavar="RATE,RATE,…",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The comparison's folder. Default: runs/NAME-compare.", metavar="FOLDER"),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw figures (needs matplotlib).")] = True,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Run several methods on the same clients, data and seeds; the same command again goes on."""
    from polyrank import config

    tried = None if rates is None else tuple(map(_number, _listed(rates)))
    read = config.read(recipe, overrides or [])
    from polyrank.compare import Request

    request = Request.of(
        read, tuple(_listed(rules)), seeds=seeds, control=control, tune=tune, rates=tried
    )
    with followed_comparison() as (invocation, following):
        from polyrank import compare
        from polyrank.compare.console import show_compared

        folder = out or Path("runs") / f"{read.name}-compare"
        compared = compare.start(request, folder, invocation, following, draw=figures)
    show_compared(compared, as_json)


def resume(
    folder: RunArgument,
    allow_inexact: Annotated[
        bool,
        typer.Option(
            "--allow-inexact",
            help="Resume in another environment, of other versions or threads; bytes may differ.",
        ),
    ] = False,
    allow_code: AllowCode = False,  # noqa: ARG001
    as_json: AsJson = False,
) -> None:
    """Go on with a run, or a comparison, that was stopped or killed, to the same bytes."""
    from polyrank import compare

    if compare.is_comparison(folder):
        with followed_comparison(allow_inexact) as (invocation, following):
            from polyrank.compare.console import show_compared

            compared = compare.resume(folder, invocation, following)
        show_compared(compared, as_json)
        return
    from polyrank.runner.inspect import recipe_of

    recipe_of(folder)  # So that what is no run's folder is an error at once.
    with followed(allow_inexact) as invocation:
        from polyrank.report.console import show
        from polyrank.runner import runner

        outcome = runner.resume(folder, invocation)
    show(outcome, as_json)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--rates: expected numbers, got {text!r}") from None
