"""Numbers along the rounds of a comparison's runs: mean and range over seeds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from polyrank.run import RoundRecord

Point = tuple[float, float | None]
"""(x, y); y is None where it was not measured."""

Runs = Mapping[str, Sequence[Sequence[RoundRecord]]]
"""Per method the records of its finished runs, one run a seed."""


@dataclass(frozen=True)
class Curve:
    """One method's values along x: their mean over seeds, the lowest and the highest."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curve(label: str, runs: Sequence[Mapping[int, Point]]) -> Curve | None:
    """Return the mean and range over runs of points by round; x is averaged too.

    Rounds that a run lacks, or whose y is None in one, are left out: a mean over changing runs
    would jump. None if nothing is left.
    """
    known = [{round: (x, y) for round, (x, y) in run.items() if y is not None} for run in runs]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    if not shared:
        return None
    ys = [[run[round][1] for run in known] for round in shared]
    return Curve(
        label,
        [fmean(run[round][0] for run in known) for round in shared],
        [fmean(y) for y in ys],
        [min(y) for y in ys],
        [max(y) for y in ys],
    )


def loss_by_round(runs: Runs) -> list[Curve]:
    """Return the validation loss of the training clients against rounds."""
    return _curves(
        runs,
        lambda run: {r.round: (r.round, r.validation_loss) for r in run if r.evaluation},
    )


def loss_by_bytes(runs: Runs) -> list[Curve]:
    """Return the validation loss of the training clients against MiB up and down so far."""

    def points(run: Sequence[RoundRecord]) -> dict[int, Point]:
        spent, points = 0, {}
        for record in run:
            spent += record.bytes_up + record.bytes_down
            if record.evaluation:
                points[record.round] = (spent / 2**20, record.validation_loss)
        return points

    return _curves(runs, points)


def discarded_by_round(runs: Runs) -> list[Curve]:
    """Return the energy discarded in each round, in percent, of the methods that discard any."""
    curves = _curves(runs, lambda run: {r.round: (r.round, 100 * r.discarded) for r in run})
    return [curve for curve in curves if max(curve.high) > 1e-6]  # Less is rounding.


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places within low…high, as near as is easy to those wanted, at least `gap` apart.

    Where there is no room for that they share the room evenly. Order is kept.
    """
    count = len(wanted)
    if count < 2:
        return [min(max(place, low), high) for place in wanted]
    gap = min(gap, (high - low) / (count - 1))
    order = sorted(range(count), key=wanted.__getitem__)
    placed: list[float] = []
    for rank, index in enumerate(order):
        least = placed[-1] + gap if placed else low
        most = high - gap * (count - 1 - rank)
        placed.append(min(max(wanted[index], least), most))
    for rank in range(count - 2, -1, -1):  # Back down, where room is left below.
        pulled = min(placed[rank], placed[rank + 1] - gap)
        placed[rank] = max(pulled, low + gap * rank)
    places = [0.0] * count
    for rank, index in enumerate(order):
        places[index] = placed[rank]
    return places


def _curves(
    runs: Runs, points: Callable[[Sequence[RoundRecord]], Mapping[int, Point]]
) -> list[Curve]:
    curves: Iterable[Curve | None] = (
        curve(label, [points(run) for run in each]) for label, each in runs.items()
    )
    return [curve for curve in curves if curve is not None]
