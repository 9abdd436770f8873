"""How much of what runs learned lies where few clients hold it: the spectra of their results.

    python benchmarks/spectrum.py RUN [RUN ...]

For each run folder: ‖D‖ of the global update over all matrices, and the share of its energy
‖D‖² behind the first 1, 4 and 8 singular directions of each matrix. A rule that shrinks directions
which few clients hold ends with small shares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from polyrank.algebra import Delta, LowRank, factor_dense, factorise
from polyrank.config import read
from polyrank.run import RunFolder

BEHIND = (1, 4, 8)


def spectrum(delta: Delta) -> list[float]:
    """Return the squared singular values of an update, largest first."""
    rank = max(1, delta.rank)
    found = (
        factorise(delta, rank) if isinstance(delta, LowRank) else factor_dense(delta.dense(), rank)
    )
    return found.s.double().square().tolist()


def row(folder: Path) -> str:
    """Return a run's line of the table."""
    saved = RunFolder.peek(folder).load_checkpoint()
    rule = read(folder / "recipe.toml").rule()
    energies = [spectrum(delta) for delta in rule.adapter(saved.state).values()]
    total = sum(map(sum, energies))
    shares = [sum(sum(one[k:]) for one in energies) / total if total else 0.0 for k in BEHIND]
    cells = [str(folder), f"{total**0.5:.2f}", *(f"{share:.1%}" for share in shares)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print("| run | ‖D‖ |", " | ".join(f"energy behind {k}" for k in BEHIND), "|")
    print("|---|" + "---:|" * (1 + len(BEHIND)))
    for argument in sys.argv[1:]:
        print(row(Path(argument)), flush=True)


if __name__ == "__main__":
    main()
