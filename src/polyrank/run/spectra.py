"""The spectra of a global adapter: the singular values of every site in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polyrank.algebra import Adapter, Delta, LowRank
from polyrank.run import storage
from polyrank.run.adapter import factored

SPECTRA = "spectra.json"


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ₁ ≥ … ≥ σᵣ of one site's update D.

    `rank` is how many are kept, of at most `largest_rank`; `norm` is ‖D‖_F; `first`, `middle` and
    `last` are σ₁, σ½ and σᵣ, None at rank 0; `rank_90` is the rank that holds 90% of ‖D‖_F².
    """

    rank: int
    largest_rank: int
    norm: float
    first: float | None
    middle: float | None
    last: float | None
    rank_90: int

    @staticmethod
    def of(delta: Delta) -> Spectrum:
        """Return the spectrum of an update; AdapterError if it is not finite."""
        s = factored(delta, delta.rank).s.double()
        energy = (s**2).cumsum(0)
        total = float(energy.amax()) if len(s) else 0.0
        first, middle, last = (float(s[i]) if len(s) else None for i in (0, len(s) // 2, -1))
        return Spectrum(
            rank=delta.rank,
            largest_rank=min(delta.shape),
            norm=total**0.5,
            first=first,
            middle=middle,
            last=last,
            rank_90=int((energy < 0.9 * total).sum()) + 1 if total else 0,
        )


def write_spectra(folder: Path, round: int, adapter: Adapter[Delta]) -> None:
    """Write the spectra after a round into a run folder, where all sites are stored as factors.

    A dense sum has too many singular values to compute them for a table that nobody may ask for.
    """
    if all(isinstance(delta, LowRank) for delta in adapter.values()):
        sites = {site: asdict(Spectrum.of(delta)) for site, delta in adapter.items()}
        storage.write_json(folder / SPECTRA, {"round": round, "sites": sites})


def read_spectra(folder: Path, round: int) -> Mapping[str, Spectrum] | None:
    """Return the spectra that were written after this round; None if those of another were."""
    if not (folder / SPECTRA).is_file():
        return None
    content: dict[str, Any] = storage.read_json(folder / SPECTRA)
    if content["round"] != round:
        return None
    return {site: Spectrum(**values) for site, values in content["sites"].items()}
