"""The adapter that a run ends with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from polyrank.algebra import Adapter, LowRank, factorise
from polyrank.errors import FolderExistsError, RankError
from polyrank.model import LoadedModel, save_adapter, save_merged
from polyrank.planning import Scaling


@dataclass(frozen=True)
class GlobalAdapter:
    """A global adapter with the model that it adapts; `factors` has every scale folded in."""

    factors: Adapter
    model: LoadedModel
    scaling: Scaling

    def truncated(self, rank: int) -> tuple[Adapter, float]:
        """Return the best approximation at `rank` per site, and the share of energy it discards.

        A site whose matrix or stored rank is smaller keeps what it has. Raises RankError for a
        rank below 1.
        """
        if rank < 1:
            raise RankError(f"export: expected a rank of at least 1, got {rank}")
        kept: dict[str, LowRank] = {}
        total = lost = 0.0
        for site, delta in self.factors.items():
            found = factorise(delta, min(rank, *delta.shape))
            kept[site] = found.lowrank()
            total, lost = total + found.energy, lost + found.discarded
        return Adapter(kept), lost / total if total else 0.0

    def save(
        self, folder: str | Path, *, rank: int | None = None, overwrite: bool = False
    ) -> float:
        """Write a PEFT folder, at `rank` if given; return the share of energy discarded.

        Raises FolderExistsError if the folder holds something, unless `overwrite`.
        """
        factors, lost = (self.factors, 0.0) if rank is None else self.truncated(rank)
        path = Path(folder)
        if not overwrite or not path.exists():
            save_adapter(path, factors, self.model, scaling=self.scaling)
            return lost
        fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        shutil.rmtree(fresh, ignore_errors=True)
        save_adapter(fresh, factors, self.model, scaling=self.scaling)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old)
        return lost

    def save_merged(self, folder: str | Path) -> float:
        """Write the base with the adapter added as a full model folder; the base stays as it is.

        Returns the share of the update, by norm, that rounding to the base's dtype cost.
        """
        if Path(folder).exists() and any(Path(folder).iterdir()):
            raise FolderExistsError(f"{folder}: holds something already; choose another folder")
        return save_merged(folder, self.factors, self.model)
