"""A comparison's result on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from polyrank.errors import PolyrankError

if TYPE_CHECKING:
    from polyrank.compare import Compared


def show_compared(compared: Compared, as_json: bool) -> None:
    """Print a comparison's tables on stdout; exit with 1 if something in it failed."""
    from polyrank import compare

    results = compared.results
    if as_json:
        content = {
            "folder": str(compared.folder),
            "finished_before": compared.finished_before,
            **results,
        }
        typer.echo(json.dumps(content, indent=2))
    else:
        console = Console(highlight=False)
        if compared.finished_before:
            told = f"{compared.folder}: finished before, nothing was trained"
            console.print(told, soft_wrap=True, markup=False)
        for sheet in compare.sheets(results):
            console.print(sheet.rich())
        console.print(
            f"{compared.folder}: compare.json, compare.md, a folder a run", soft_wrap=True
        )
    if results["failures"]:
        head = f"{compared.folder}: not all of the comparison came to a result:"
        raise PolyrankError("\n  ".join([head, *map(compare.failure, results["failures"])]))
