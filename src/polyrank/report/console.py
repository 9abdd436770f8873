"""The result of a run on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    from polyrank.runner.runner import Outcome


def show(outcome: Outcome, as_json: bool) -> None:
    """Print the result of a run, and of its control, on stdout."""
    run, beside = outcome.run, outcome.control
    summary, control = run.summary, None if beside is None else beside.summary
    if as_json:
        content = {
            "folder": str(outcome.folder),
            "finished_before": run.finished_before,
            **summary,
        }
        if beside is not None:
            content["control"] = {"finished_before": beside.finished_before, **beside.summary}
        typer.echo(json.dumps(content, indent=2))
        return
    from polyrank import report

    console = Console(highlight=False)
    if run.finished_before:
        only = beside is None or beside.finished_before
        told = "nothing was trained" if only else "only its control was trained now"
        console.print(f"{outcome.folder}: finished before, {told}", soft_wrap=True, markup=False)
    console.print(report.categories(summary["per_category"]))
    console.print(
        report.scores(
            summary["base"],
            summary["method"],
            summary["final"],
            control["final"] if control else None,
            outcome.forced or "",
        )
    )
    if summary.get("benchmark"):  # Runs of before had none.
        beside = control["benchmark"]["final"] if control else None
        held_out = summary["benchmark"]
        console.print(
            report.benchmark(
                held_out["base"],
                summary["method"],
                held_out["final"],
                beside,
                outcome.forced or "",
            )
        )
    troubled = report.participation(summary.get("clients", {}))  # Runs of before did not tell.
    if troubled is not None:
        console.print(troubled)
    console.print(report.spent(summary))
    console.print(report.loading(outcome.folder / "adapter"), soft_wrap=True, markup=False)
    answers = report.answers(summary.get("samples", []))  # Runs of version 0.1 kept none.
    if answers is not None:
        console.print(answers)
    console.print(report.gain(summary, control, outcome.forced or ""))
