"""Results of commands on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    from polyrank.runner.inspect import RunInspection
    from polyrank.runner.plans import PlanPreview
    from polyrank.runner.runner import Outcome


def show_prospect(prospect: PlanPreview, as_json: bool) -> None:
    """Print what is planned for devices on stdout."""
    if as_json:
        typer.echo(json.dumps(prospect.to_json(), indent=2, ensure_ascii=False))
        return
    from polyrank.report import plans as prospects

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(prospects.table(prospect))
    for line in prospects.remarks(prospect):
        console.print(line, markup=False, soft_wrap=True)


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
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
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


def show_inside(inside: RunInspection) -> None:
    """Print what a run folder holds on stdout: ranks, rounds and the adapter's spectra."""
    from polyrank import report
    from polyrank.run.summary import participation
    from polyrank.runner.inspect import cuts_of

    console = Console(highlight=False)
    for note in inside.notes:
        console.print(note, style="yellow", markup=False)
    if inside.fleet is not None:
        types = list(inside.fleet["clients"].values())
        counts = {name: types.count(name) for name in inside.fleet["ranks"]}
        cuts, blocks = cuts_of(inside.fleet)
        console.print(report.ranks(counts, inside.fleet["ranks"], cuts, blocks))
    wire = any(record.wire_up + record.wire_down for record in inside.records)
    console.print(report.round_header(wire), style="bold")
    for record in inside.records:
        console.print(report.round_line(record, wire))
    troubled = report.participation(participation(map(vars, inside.records)))
    if troubled is not None:
        console.print(troubled)
    if not inside.records:
        console.print("no round is finished yet")
        return
    measured = [text for record in inside.records if (text := report.own_rank(record))]
    if measured:
        console.print(measured[-1])
    if inside.result_round < inside.records[-1].round:
        console.print(f"early stopping keeps the adapter of round {inside.result_round}")
    at_result = next(r for r in inside.records if r.round == inside.result_round)
    if inside.factors is not None:
        console.print(report.spectra(inside.factors, at_result))
