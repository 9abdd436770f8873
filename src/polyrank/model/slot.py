"""A slot: one client's place in a cohort, and its checks against the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyrank.aggregation.types import TRAINED, Penalty, Train
from polyrank.algebra import Adapter, Delta, Dense, LowRank, Sparse
from polyrank.errors import RankError, SiteError


@dataclass(frozen=True)
class Slot:
    """One client's place in a cohort: what it trains and how its inputs are dropped out.

    `start` has every scale s folded into B, `scale` gives s per site, `frozen` is active and not
    trained. A `Sparse` start is trained at its positions and a `Dense` one at all entries, without
    a scale. `train` says which factors are trained, and `penalty` is a term of the loss, on factors
    with s divided out. `dropout` is the probability of LoRA's input dropout and `seed` the seed of
    its masks; only factors have dropout.
    """

    start: Adapter[Delta]
    scale: Mapping[str, float]
    frozen: Adapter[LowRank] = field(default_factory=lambda: Adapter({}))
    dropout: float = 0.0
    seed: int = 0
    train: Train = "both"
    penalty: Penalty | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether values at few positions are trained, somewhere."""
        return any(isinstance(delta, Sparse) for delta in self.start.values())

    @property
    def is_dense(self) -> bool:
        """Whether whole matrices are trained, somewhere."""
        return any(isinstance(delta, Dense) for delta in self.start.values())

    @property
    def is_lowrank(self) -> bool:
        """Whether factors are trained, somewhere."""
        return any(isinstance(delta, LowRank) and delta.rank for delta in self.start.values())


def check_slots(slots: Sequence[Slot], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise SiteError or RankError if a slot does not fit sites of these shapes, or the others."""
    if not slots:
        raise SiteError("Cohort: expected at least one slot, got none")
    for k, slot in enumerate(slots):
        _check(f"Cohort, slot {k} of {len(slots)}", slot, shapes)
    kinds = {
        "sparse": any(slot.is_sparse for slot in slots),
        "factors": any(slot.is_lowrank for slot in slots),
        "dense": any(slot.is_dense for slot in slots),
    }
    present = [kind for kind, there in kinds.items() if there]
    if len(present) > 1:
        raise SiteError(
            f"Cohort: some starts are {' and some are '.join(present)}; expected one kind at all "
            "slots and sites (or rank 0, nothing to train). Train clients of each kind in a cohort "
            "of their own"
        )


def check_delta(place: str, site: str, delta: Delta, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise SiteError if an update is not of the matrix at its site."""
    if site not in shapes:
        raise SiteError(f"{place} at {site}, which is not a site of the model")
    if delta.shape != shapes[site]:
        raise SiteError(
            f"{place} at {site} is {delta.shape}, the matrix there is {shapes[site]} (out × in)"
        )


def _check(place: str, slot: Slot, shapes: Mapping[str, tuple[int, int]]) -> None:
    named: list[tuple[str, Mapping[str, Any]]] = [("start", slot.start), ("scale", slot.scale)]
    for what, mapping in named:
        missing = sorted(set(shapes) - set(mapping))
        extra = sorted(set(mapping) - set(shapes))
        if missing or extra:
            raise SiteError(
                f"{place}: {what} must cover exactly the model's {len(shapes)} sites; "
                f"missing {missing[:5]}, not in the model {extra[:5]}. Use LowRank.zero for a site "
                "without an update, and load the model with the sites of the adapter"
            )
    unknown = sorted(set(slot.frozen) - set(shapes))
    if unknown:
        raise SiteError(f"{place}: frozen terms at {unknown[:5]}, not sites of the model")
    for what, adapter in (("start", slot.start), ("frozen", slot.frozen)):
        for site, delta in adapter.items():
            check_delta(f"{place}: {what}", site, delta, shapes)
    for site, delta in slot.start.items():
        _check_start(f"{place}, {site}", slot, delta)
    for site, scale in slot.scale.items():
        if not (math.isfinite(scale) and scale != 0.0):
            raise SiteError(f"{place}: the scale at {site} must be finite and not 0, got {scale}")
    if not 0.0 <= slot.dropout < 1.0:
        raise SiteError(f"{place}: dropout must be in [0, 1), got {slot.dropout}")
    if slot.penalty is not None:
        _check_penalty(place, slot, slot.penalty)


def _check_start(place: str, slot: Slot, delta: Delta) -> None:
    if not isinstance(delta, LowRank | Sparse | Dense):
        raise SiteError(
            f"{place}: a start of kind {type(delta).__name__} cannot be trained; expected LowRank "
            "factors, or a Sparse or Dense update"
        )
    if isinstance(delta, LowRank) and delta.rank > min(delta.shape):
        raise RankError(
            f"{place}: rank {delta.rank} is above what a matrix of {delta.shape} allows"
        )
    if not isinstance(delta, LowRank) and slot.train != "both":
        kind = type(delta).__name__.lower()
        alone = " and ".join(TRAINED[slot.train]).upper()
        raise SiteError(f"{place}: a {kind} start has no {alone} to train alone; use train='both'")
    if isinstance(delta, Sparse):
        m, n = delta.shape
        inside = not delta.positions.numel() or 0 <= delta.positions.min() <= delta.positions.max()
        if not inside or (delta.positions.numel() and delta.positions.max() >= m * n):
            raise SiteError(f"{place}: expected positions in 0…{m * n - 1}")


def _check_penalty(place: str, slot: Slot, penalty: Penalty) -> None:
    unfit = [s for s in penalty.keep if not isinstance(slot.start.get(s), LowRank)]
    if unfit:
        raise SiteError(f"{place}: a penalty at {unfit[:5]}, where no factors are trained")
    if not (math.isfinite(penalty.strength) and penalty.strength >= 0):
        raise SiteError(f"{place}: expected a penalty of 0 or more, got {penalty.strength}")
    low = {site: keep for site, keep in penalty.keep.items() if keep < 0}
    if low:
        raise RankError(f"{place}: a penalty keeps ranks of 0 or more, got {low}")
