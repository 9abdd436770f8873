"""The adapter that a run ends with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from polyrank.algebra import Adapter, Delta, Factorisation, LowRank, factor_dense, factorise
from polyrank.errors import AdapterError, FolderExistsError, RankError

if TYPE_CHECKING:
    from polyrank.model import LoadedModel
    from polyrank.planning import Scaling


@dataclass(frozen=True)
class GlobalAdapter:
    """A global adapter with the model that it adapts; `factors` has every scale folded in.

    What a rule keeps as an exact sum is dense, and becomes factors where it must: at `ranks` per
    site, the server's, or where it has none at the largest rank of its matrix.
    """

    factors: Adapter[Delta]
    model: LoadedModel
    scaling: Scaling
    ranks: Mapping[str, int] = field(default_factory=dict)

    def truncated(self, rank: int) -> tuple[Adapter[LowRank], float]:
        """Return the best approximation at `rank` per site, and the share of energy it discards.

        A site whose matrix or stored rank is smaller keeps what it has. Raises RankError for a
        rank below 1.
        """
        if rank < 1:
            raise RankError(f"export: expected a rank of at least 1, got {rank}")
        return _cut(self.factors, dict.fromkeys(self.factors, rank))

    def lowrank(self) -> tuple[Adapter[LowRank], float]:
        """Return factors at every site, and the share of energy that this discards.

        Stored factors stay as they are; anything else is cut to the server's rank.
        """
        factors = {s: d for s, d in self.factors.items() if isinstance(d, LowRank)}
        sums = Adapter({s: d for s, d in self.factors.items() if s not in factors})
        if not sums:
            return Adapter(factors), 0.0
        cut, share = _cut(sums, {s: self.ranks.get(s, d.rank) for s, d in sums.items()})
        total = self.factors.norm() ** 2
        return Adapter({**factors, **cut}), share * sums.norm() ** 2 / total if total else 0.0

    def save(
        self, folder: str | Path, *, rank: int | None = None, overwrite: bool = False
    ) -> float:
        """Write a PEFT folder, at `rank` if given; return the share of energy discarded.

        Without `rank` only what is not stored as factors is cut, to the server's rank. Raises
        FolderExistsError if the folder holds something, unless `overwrite`.
        """
        from polyrank.model import save_adapter

        factors, lost = self.lowrank() if rank is None else self.truncated(rank)
        path = Path(folder)
        if not overwrite or not path.exists():
            save_adapter(path, factors, self.model, scaling=self.scaling)
            return lost
        new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        shutil.rmtree(new, ignore_errors=True)
        save_adapter(new, factors, self.model, scaling=self.scaling)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
        return lost

    def save_merged(self, folder: str | Path) -> float:
        """Write the base with the adapter added as a full model folder; the base stays as it is.

        Dense sums are added whole, nothing is cut. Returns the share of the update, by norm, that
        rounding to the base's dtype cost.
        """
        from polyrank.model import save_merged

        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise FolderExistsError(f"{folder}: holds something already; choose another folder")
        return save_merged(folder, self.factors, self.model)


def factored(delta: Delta, rank: int) -> Factorisation:
    """Return the best approximation of an update of any kind, at `rank` (at least 1)."""
    wanted = max(1, min(rank, *delta.shape))
    if isinstance(delta, LowRank):
        return factorise(delta, wanted)
    if not delta.is_finite():
        raise AdapterError("an update of the global adapter holds NaN or infinity")
    return factor_dense(delta.dense(), wanted)


def _cut(adapter: Adapter[Delta], ranks: Mapping[str, int]) -> tuple[Adapter[LowRank], float]:
    """Return the adapter at these ranks, and the share of energy discarded."""
    cut: dict[str, LowRank] = {}
    total = lost = 0.0
    for site, delta in adapter.items():
        parts = factored(delta, ranks[site])
        cut[site] = parts.lowrank()
        total, lost = total + parts.energy, lost + parts.discarded
    return Adapter(cut), lost / total if total else 0.0
