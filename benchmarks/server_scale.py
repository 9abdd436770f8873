"""The server's step for one matrix with 80 clients of ranks 8 to 200, kept at rank 200.

The stacked rank is in the thousands: larger than the matrix. Types of client as in FlexLoRA's
paper: ranks 8, 30, 30, 200 at 2048×2048 (attention), 8, 30, 200, 200 at 2048×5504 (feed-forward),
with 20 clients of each (`uniform`) or 4, 4, 4 and 68 (`heavy-tail-strong`).

    OMP_NUM_THREADS=1 python benchmarks/server_scale.py            # about ten minutes
    OMP_NUM_THREADS=1 python benchmarks/server_scale.py --quick    # 512×512, a few seconds

Timed from the clients' float32 factors in memory, weighting, checks and the accumulation of the sum
included: `strict` (method auto), `fast` (method randomised) from a cold start and from the V of the
round before. Reference is `torch.linalg.svd` of the finished float32 sum, without the time to form
it, timed once per repeat and taken once per distinct rank; LAPACK takes about half as long for the
transpose of the wide matrix. All run in turn in each repeat; medians of the process's own time on
one thread, so that what else the machine does matters less.

Stacks are `random` (independent factors: no spectral gap, and last round's V is worthless) or
`collinear` (each client moved a thousandth away from its prefix). Excess is (‖D − X‖ − ‖D − T₂₀₀D‖)
/ ‖D‖ in float64. Memory is what the process's resident set rose by while the step ran, less the
result, in units of one dense float32 matrix: workspaces of LAPACK and one client's factors, as read
and as weighted, are counted in. It is measured in a fresh process (Linux only), in which factors
are made one client at a time and the allocator keeps nothing that was freed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from polyrank.algebra import Factorisation, LowRank, factorise

T = TypeVar("T")
COUNTS = {"uniform": (20, 20, 20, 20), "heavy-tail-strong": (4, 4, 4, 68)}
TYPES = {
    (2048, 2048): (8, 30, 30, 200),
    (2048, 5504): (8, 30, 200, 200),
    (512, 512): (2, 8, 8, 50),
}
WAYS = {"strict": ("auto", False), "fast, cold": ("randomised", False)}
WAYS["fast, warm"] = ("randomised", True)


@dataclass(frozen=True)
class Case:
    """80 clients at one matrix, all drawn from `seed`."""

    shape: tuple[int, int]
    distribution: str
    stack: str

    @property
    def rank(self) -> int:
        """The server's."""
        return max(TYPES[self.shape])

    @property
    def ranks(self) -> list[int]:
        """One client of each type in turn, as long as there are any."""
        left = list(COUNTS[self.distribution])
        order = []
        while any(left):
            for i in [i for i, count in enumerate(left) if count]:
                order.append(TYPES[self.shape][i])
                left[i] -= 1
        return order

    def held(self) -> tuple[LowRank, Tensor]:
        """Return last round's D, of σ_j = 1/√j, and its V."""
        draw = torch.Generator().manual_seed(0)
        u, v = (
            torch.linalg.qr(torch.randn(size, self.rank, generator=draw)).Q for size in self.shape
        )
        return LowRank(u * torch.arange(1, self.rank + 1).float().rsqrt(), v.T), v

    def updates(self) -> Iterator[LowRank]:
        """Yield the clients' updates, unweighted, each made when asked for."""
        draw = torch.Generator().manual_seed(1)
        (m, n), held = self.shape, self.held()[0]
        for r in self.ranks:
            b = torch.randn(m, r, generator=draw) / math.sqrt(m)
            a = torch.randn(r, n, generator=draw) / math.sqrt(n)
            if self.stack == "collinear":
                start = held.prefix(r)
                b, a = b.mul_(1e-3).add_(start.b), a.mul_(1e-3).add_(start.a)
            yield LowRank(b, a)


def step(case: Case, way: str, updates: Iterator[LowRank], v: Tensor) -> Factorisation:
    method, warm = WAYS[way]
    weighted = (one.scale(1 / len(case.ranks)) for one in updates)
    return factorise(weighted, case.rank, method=method, warm=v if warm else None)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(case: Case, way: str) -> float:
    """Run one step and return the rise of the resident set beyond the result, in dense matrices."""
    small = Case((512, 512), case.distribution, case.stack)
    step(small, way, small.updates(), small.held()[1])  # loads what the libraries load once
    updates, v = case.updates(), case.held()[1]
    next(updates)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    found = step(case, way, updates, v)
    rise = resident("VmHWM") - before
    result = sum(x.nbytes for x in (found.u, found.s, found.v))
    return (rise - result) / (4 * math.prod(case.shape))


def peak_apart(case: Case, way: str) -> str:
    if not Path("/proc/self/clear_refs").exists():
        return "–"
    shape = "x".join(map(str, case.shape))
    which = [shape, case.distribution, case.stack, way]
    done = subprocess.run(
        [sys.executable, __file__, "--peak", *which],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    return f"{float(done.stdout):.1f}"


def rows(case: Case, repeats: int) -> Iterator[str]:
    updates, (_, v) = list(case.updates()), case.held()
    exact = torch.zeros(case.shape, dtype=torch.float64)
    for one in updates:
        exact.addmm_(one.b.double(), one.a.double(), alpha=1 / len(updates))
    short = exact if exact.shape[0] <= exact.shape[1] else exact.T
    squares = torch.linalg.eigvalsh(short @ short.T).clamp(min=0)
    norm, optimum = float(exact.norm()), float(squares[: -case.rank].sum()) ** 0.5
    single = exact.float()
    seconds: dict[str, list[float]] = {way: [] for way in ("svd", *WAYS)}
    found: dict[str, Factorisation] = {}
    for _ in range(repeats):
        one, _ = timed(partial(torch.linalg.svd, single, full_matrices=False))
        seconds["svd"].append(one)
        for way in WAYS:
            one, found[way] = timed(partial(step, case, way, iter(updates), v))
            seconds[way].append(one)
    distinct = len(set(case.ranks))
    svd = statistics.median(seconds["svd"])
    for way in WAYS:
        mine = statistics.median(seconds[way])
        x = found[way].lowrank().to(dtype=torch.float64).dense()
        yield (
            f"| {case.shape[0]}×{case.shape[1]} | {case.distribution}, {sum(case.ranks)} "
            f"| {case.stack} | {svd:.2f} s × {distinct} | {way} | {found[way].method} "
            f"| {mine:.2f} s | {distinct * svd / mine:.1f} "
            f"| {(float((exact - x).norm()) - optimum) / norm:.1e} | {peak_apart(case, way)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512×512 only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.peak:
        shape, distribution, stack, way = chosen.peak
        m, n = map(int, shape.split("x"))
        print(peak(Case((m, n), distribution, stack), way))
        return
    print(
        f"torch {torch.__version__}, {platform.machine()}, one thread; 80 clients; "
        f"medians of {chosen.repeats}\n"
    )
    print(
        "| matrix | clients, R | stack | dense SVDs | path | ran | seconds | times faster | excess "
        "| memory |\n|---|---|---|---:|---|---|---:|---:|---:|---:|"
    )
    for shape in [(512, 512)] if chosen.quick else [(2048, 2048), (2048, 5504)]:
        for distribution in COUNTS:
            for stack in ("random", "collinear"):
                for row in rows(Case(shape, distribution, stack), chosen.repeats):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
