"""Arguments and options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeArgument = Annotated[
    Path,
    typer.Argument(
        help="A file in TOML, or a recipe that comes with polyrank, such as quickstart.",
        metavar="RECIPE",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as local.lr=1e-3; an empty value takes a key back to "
        "its default.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(
        help="A run's folder, such as runs/quickstart.", metavar="RUN", show_default=False
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")
]


def _allow_code(context: typer.Context, allowed: bool) -> bool:
    """Allow it until the command has ended."""
    if allowed:
        from polyrank.aggregation import code_allowed

        context.with_resource(code_allowed(str(Path.cwd())))
    return allowed


AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        callback=_allow_code,
        help="Run the recipe's own rule, aggregation.rule = module:Class, from a file beside the "
        "recipe or here, or installed. It runs with your rights: allow it for recipes that you "
        "trust.",
    ),
]


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines to copy."""
    return "\n\n".join(["Examples:", *lines])


def print_json(content: Any) -> None:
    """Print JSON on stdout."""
    typer.echo(json.dumps(content, indent=2))
