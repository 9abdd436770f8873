"""A comparison begun, or gone on with, and its results written beside its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.compare import figures
from polyrank.compare.request import Request, is_comparison
from polyrank.compare.results import collect
from polyrank.compare.run import Comparison, ComparisonListener
from polyrank.compare.table import markdown
from polyrank.errors import FolderExistsError
from polyrank.run import storage
from polyrank.runner.parts import Invocation

RESULTS, TEXT = "compare.json", "compare.md"


@dataclass(frozen=True)
class Compared:
    """Where a comparison lies, and what is in its compare.json.

    `finished_before` if every run was finished by an earlier command and nothing was trained.
    """

    folder: Path
    results: Mapping[str, Any]
    finished_before: bool = False


def start(
    request: Request,
    out: Path,
    invocation: Invocation,
    listener: ComparisonListener,
    *,
    draw: bool = True,
) -> Compared:
    """Carry out a comparison in `out`, or go on with the one in it.

    FolderExistsError if there is something else in `out`, RecipeError if the comparison in it was
    begun with another request; more rules or seeds are welcome. compare.json and compare.md are
    written after every run, so that a comparison can be read while it goes on; the figures at the
    end, unless `draw` is off.
    """
    if draw:
        figures.check_drawing()
    if is_comparison(out):
        request.continues(Request.load(out), out)
    elif out.exists():
        raise FolderExistsError(
            f"{out}: exists already and holds no comparison; choose another --out"
        )
    comparison = Comparison(request, out, invocation, listener)

    def write() -> dict[str, Any]:
        results = collect(request, out, comparison.methods)
        storage.write_json(out / RESULTS, results)
        storage.write_text(out / TEXT, markdown(results))
        return results

    comparison.carry_out(write)
    results = write()
    if draw:
        figures.draw(results, out)
    return Compared(out, results, comparison.finished_before)


def resume(out: Path, invocation: Invocation, listener: ComparisonListener) -> Compared:
    """Go on with the comparison in a folder; what is finished is not done again.

    Figures are drawn where matplotlib is there.
    """
    return start(Request.load(out), out, invocation, listener, draw=figures.can_draw())
