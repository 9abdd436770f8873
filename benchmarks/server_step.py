"""The server's step for one matrix against a dense SVD: seconds, ratios, excess error.

Eight clients of ranks 4, 8, 16, 32, 64, 4, 8, 16 return float32 factors; the server merges them at
rank 64. Timed is the whole of `FlexLoRA.merge_site`: checks, weighting, sum, factorisation. The
reference is `torch.linalg.svd` of the dense float32 sum, without the time to form it. Both run side
by side in this process, on the number of threads given.

    python benchmarks/server_step.py            # 4096×4096 and 4096×11008, about fifteen minutes
    python benchmarks/server_step.py --quick    # 1024×1024, a few seconds

Stacks are `random` (independent factors; no spectral gap anywhere) or `collinear` (each client
moved a thousandth away from the prefix that it was sent). Excess is (‖D − X‖ − ‖D − T₆₄D‖) / ‖D‖,
all norms taken in float64 from the factors and the optimum from the strict path in float64, so no
dense float64 SVD is needed. Printed is a table in Markdown. What the table calls `dense` is our
own path for stacks that are not thin, named here for comparison; `auto` never takes it for these.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from polyrank.aggregation import Contribution, FleetSpec, FlexLoRA, State, normalised
from polyrank.algebra import LowRank, factorise

SITE = "site"
RANKS = (4, 8, 16, 32, 64, 4, 8, 16)
EXAMPLES = (120, 40, 300, 80, 160, 60, 200, 90)
SERVER_RANK = 64
METHODS = ("auto", "gram", "qr", "randomised", "dense")


@dataclass(frozen=True)
class Case:
    """A state, what the clients return in it, and the exact sum D as float64 factors."""

    rule: FlexLoRA
    state: State
    contributions: list[Contribution]
    exact: LowRank


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


def case(mode: str, stack: str, shape: tuple[int, int]) -> Case:
    """Return a round in which the server holds a D of rank 64 whose σ falls as 1/√j."""
    draw = torch.Generator().manual_seed(0)
    (m, n), rule = shape, FlexLoRA(mode)
    u, v = (torch.linalg.qr(normal(draw, size, SERVER_RANK)).Q for size in shape)
    s = torch.arange(1, SERVER_RANK + 1).float().rsqrt()
    spec = FleetSpec({SITE: shape}, {}, {SITE: SERVER_RANK}, seed=0)
    state = rule.init(spec).update({f"{SITE}/u": u, f"{SITE}/s": s, f"{SITE}/v": v})
    contributions = []
    exact = [LowRank(u * s, v.T)] if mode == "delta" else []
    for w, r in zip(normalised(EXAMPLES), RANKS, strict=True):
        assigned = rule.assign_site(state, SITE, r, 16 / r, seed=0)
        noise = LowRank(normal(draw, m, r) / m**0.5, normal(draw, r, n) / n**0.5)
        near = LowRank(assigned.start.b + 1e-3 * noise.b, assigned.start.a + 1e-3 * noise.a)
        result = {"random": noise, "collinear": near}[stack]
        contributions.append(Contribution(w, assigned, result))
        exact.append(result.to(dtype=torch.float64).scale(w))
        if mode == "delta":
            exact.append(assigned.start.to(dtype=torch.float64).scale(-w))
    return Case(rule, state, contributions, LowRank.stack(e.to(dtype=torch.float64) for e in exact))


def merge(given: Case, method: str) -> LowRank:
    rule = FlexLoRA(given.rule.mode, factorisation=method)
    state, _ = rule.merge_site(given.state, SITE, iter(given.contributions))
    return rule.adapter(state)[SITE]


def timed(work: Callable[[], LowRank], repeats: int) -> tuple[float, LowRank]:
    """Return the median of seconds over the repeats, and the result."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), found


def dense_svd(d: Tensor) -> LowRank:
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    return LowRank(u[:, :SERVER_RANK] * s[:SERVER_RANK], vh[:SERVER_RANK])


def rows(mode: str, stack: str, shape: tuple[int, int], repeats: int) -> Iterator[str]:
    given = case(mode, stack, shape)
    best = factorise(given.exact, SERVER_RANK, method="qr")
    norm, optimum = best.energy**0.5, best.discarded**0.5

    def row(name: str, seconds: float, reference: float, found: LowRank) -> str:
        error = (given.exact - found.to(dtype=torch.float64)).norm()
        return (
            f"| {shape[0]}×{shape[1]} | {mode} | {stack} | {name} | {seconds * 1e3:.1f} "
            f"| {reference / seconds:.1f} | {(error - optimum) / norm:.1e} |"
        )

    reference, found = timed(partial(dense_svd, given.exact.dense().float()), 1)
    yield row("torch.linalg.svd", reference, reference, found)
    for method in METHODS:
        times = 1 if method == "dense" else repeats
        if times > 1:
            merge(given, method)  # warm the allocator, as any second matrix finds it
        seconds, found = timed(partial(merge, given, method), times)
        yield row(method, seconds, reference, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1024×1024 only")
    parser.add_argument("--repeats", type=int, default=7, help="of all but the dense ones")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    shapes = [(1024, 1024)] if chosen.quick else [(4096, 4096), (4096, 11008)]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {chosen.threads} thread(s); ranks "
        f"{RANKS}, server rank {SERVER_RANK}; medians of {chosen.repeats}, dense ones once\n"
    )
    print("| shape | mode | stack | method | ms | times faster | excess |")
    print("|---|---|---|---|---:|---:|---:|")
    for shape in shapes:
        for mode in ("replace", "delta"):
            for stack in ("random", "collinear"):
                for row in rows(mode, stack, shape, chosen.repeats):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
