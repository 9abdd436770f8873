"""Validation of updates against their assignments."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from polyrank.aggregation import Assignment, Train, Update, fixed
from polyrank.algebra import Delta
from polyrank.errors import UpdateError
from polyrank.lazy_torch import torch
from polyrank.rounds.clipping import moved

METRICS = ("loss", "tokens", "target_tokens")
"""The numbers that every update must carry, for the round's record."""

WIRE = ("wire_up", "wire_down")
"""Those that an update of a split client carries too: bytes of its activations and gradients."""


def check_update(
    update: Update,
    assignment: Assignment,
    expected: str,
    place: str,
    split: bool,
    max_increment: float | None = None,
    sites: Collection[str] | None = None,
) -> None:
    """Raise UpdateError, beginning with `place`, unless the update answers the assignment.

    `expected` is the assignment's hash, `split` whether the client's model is cut; an update with
    ‖ΔW − start‖_F over all sites above `max_increment` is refused. `sites` are those of
    the model, which may be scored; None: those of the assignment.
    """
    if update.assignment != expected:
        raise UpdateError(
            f"{place}: it was trained from other factors than were sent (hash "
            f"{update.assignment[:12]}…, expected {expected[:12]}…)"
        )
    if update.examples < 1:
        raise UpdateError(f"{place}: expected at least 1 training example, got {update.examples}")
    for name in METRICS:
        value = update.metrics.get(name)
        if value is None or not math.isfinite(value):
            raise UpdateError(f"{place}: expected a finite number as {name!r}, got {value}")
    if update.metrics["target_tokens"] < 1:
        raise UpdateError(f"{place}: expected at least 1 target token")
    for name in WIRE if split else ():
        if counted(update.metrics, name) is None:
            raise UpdateError(
                f"{place}: expected a number of bytes as {name!r}, as the client's model is cut, "
                f"got {update.metrics.get(name)}"
            )
    _check_importance(update, assignment.start if sites is None else sites, place)
    missing = sorted(assignment.start.keys() - update.adapter.keys())
    extra = sorted(update.adapter.keys() - assignment.start.keys())
    if missing or extra:
        raise UpdateError(f"{place}: sites missing {missing}, sites not asked for {extra}")
    for site, start in assignment.start.items():
        result = update.adapter[site]
        if result.shape != start.shape or result.rank != start.rank:
            raise UpdateError(
                f"{place}: at {site} expected {start.shape} of rank {start.rank}, got "
                f"{result.shape} of rank {result.rank}"
            )
        _check_kind(f"{place}: at {site}", start, result, assignment.train)
        if not result.is_finite():
            raise UpdateError(
                f"{place}: NaN or infinite entries at {site}; lower the learning rate or clip"
            )
    if max_increment is not None:
        _check_increment(update, assignment, place, max_increment)


def counted(metrics: Mapping[str, float], name: str) -> int | None:
    """Return a metric that counts bytes, or None if it is missing or can be no count."""
    value = metrics.get(name)
    return int(value) if value is not None and math.isfinite(value) and value >= 0 else None


def _check_importance(update: Update, sites: Collection[str], place: str) -> None:
    unknown = sorted(update.importance.keys() - set(sites))
    if unknown:
        raise UpdateError(
            f"{place}: importance of {unknown[:5]}, which are no sites of the model; expected "
            "scores of its sites alone"
        )
    for site, score in update.importance.items():
        if not (math.isfinite(score) and score >= 0):
            raise UpdateError(
                f"{place}: expected a finite importance of 0 or more at {site}, got {score}; look "
                "for a loss that overflowed: a lower learning rate or a float32 base may help"
            )


def _check_kind(place: str, start: Delta, result: Delta, train: Train) -> None:
    if type(result) is not type(start):
        raise UpdateError(f"{place} expected {type(start).__name__}, got {type(result).__name__}")
    for sent, came in zip(start.tensors().values(), result.tensors().values(), strict=True):
        if sent.dtype.is_floating_point and not came.dtype.is_floating_point:
            raise UpdateError(f"{place} expected real numbers, got {came.dtype}")
    for name in fixed(start, train):
        if not _same(start, result, name):
            raise UpdateError(f"{place} expected {name} as it was sent, since it is not trained")


def _check_increment(update: Update, assignment: Assignment, place: str, bound: float) -> None:
    norm = moved(update.adapter, assignment)
    if not norm <= bound:
        raise UpdateError(
            f"{place}: its increment has norm {norm:.4g}, more than max_increment = {bound}"
        )


def _same(start: Delta, result: Delta, name: str) -> bool:
    """Whether a tensor that is not trained came back as it was sent."""
    before, after = start.tensors()[name], result.tensors()[name]
    return torch.equal(before.to(after.dtype), after)
