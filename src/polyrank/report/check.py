"""The page of `polyrank check`: what a run of a recipe would do."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from polyrank.planning.plan import in_units
from polyrank.report.cuts import hosted
from polyrank.report.tables import table
from polyrank.report.words import count, duration, operations
from polyrank.runner.check import NAMED, RecipeCheck


def page(checked: RecipeCheck) -> Iterator[RenderableType]:
    """Yield data, rows left out, types, memory and time, and what would stop the run."""
    tokens = [*checked.tokens.values()]
    examples = ", ".join(f"{number} to {part}" for part, number in _parts(checked))
    yield Text.assemble(
        (checked.name, "bold"),
        f": {checked.model}, {checked.matrices} adapted matrices, {count(checked.rounds, 'round')}",
    )
    yield Text(
        f"{count(checked.training, 'client')} to train, {checked.a_round} of them in a round; "
        f"{checked.held_out} held out"
    )
    yield Text(f"examples: {examples}")
    yield Text(
        f"tokens to train on: {sum(tokens):,}, with loss {checked.targets:,}; a client has "
        f"{min(tokens):,} to {max(tokens):,}, the median {statistics.median(tokens):,.0f}; the "
        f"longest example {checked.longest:,}"
    )
    yield from _skipped(checked)
    yield _types(checked)
    yield Text(
        f"memory on {checked.device}: {in_units(checked.needed)} for one client at a time, by "
        f"estimate; {in_units(checked.free)} are free"
    )
    training = "training, the control's too" if checked.time.of_control else "training"
    yield Text(
        f"time: at least {duration(checked.time.seconds)} of {training}, for "
        f"{operations(checked.time.operations)} at {operations(checked.time.rate)}/s, as measured "
        "here now; evaluation and aggregation come on top"
    )
    for problem in checked.problems:
        yield Text(problem, style="red")
    yield Text("cannot run as it is" if checked.problems else "can run")


def _parts(checked: RecipeCheck) -> list[tuple[str, int]]:
    words = {"train": "train", "validation": "validate", "test": "test"}
    return [(words[part], number) for part, number in checked.examples.items()]


def _skipped(checked: RecipeCheck) -> Iterator[RenderableType]:
    for reason, rows in checked.skipped.rows.items():
        if rows:
            more = ", …" if len(rows) > NAMED else ""
            named = ", ".join(rows[:NAMED])
            yield Text(f"not used: {len(rows)} {reason} ({named}{more})", style="yellow")


def _types(checked: RecipeCheck) -> Table:
    made = table("types of clients")
    made.add_column("type", overflow="fold")
    made.add_column("clients", justify="right")
    made.add_column("memory", justify="right", no_wrap=True)
    made.add_column("ranks")
    cut = any(kind.cut for kind in checked.types)
    if cut:
        made.add_column("runs itself")
    for kind in checked.types:
        ranks = (f"{rank} at {count(n, 'matrix', 'matrices')}" for rank, n in kind.ranks.items())
        made.add_row(
            kind.name,
            str(kind.clients),
            in_units(kind.memory.total),
            ", ".join(ranks),
            *([hosted(kind.cut, checked.blocks)] if cut else []),
        )
    return made
