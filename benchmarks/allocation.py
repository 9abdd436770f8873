"""How near ranks by `allocate` come to the best, and how long they take.

Random cases of up to six sites are compared with every allocation there is; models of the sizes of
Llama 2 7B and 70B (32 and 80 blocks, seven sites each) with the relaxed problem, whose ranks need
not be levels and whose optimum is not below the real one.

    python benchmarks/allocation.py            # about ten seconds
    python benchmarks/allocation.py --quick    # one second

Printed are tables in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from polyrank.planning.allocate import allocate

POWERS = (1, 2, 4, 8, 16, 32, 64)


def best(
    gain: Mapping[str, float],
    unit: Mapping[str, int],
    budget: int,
    levels: Sequence[int],
    limit: Mapping[str, int],
) -> float:
    """The largest value of all allocations."""
    options = [[0, *(level for level in levels if level <= limit[site])] for site in gain]
    costs, gains = list(unit.values()), list(gain.values())
    return max(
        sum(map(float.__mul__, gains, map(float, ranks)))
        for ranks in itertools.product(*options)
        if sum(map(int.__mul__, costs, ranks)) <= budget
    )


def relaxed(gain: Mapping[str, float], unit: Mapping[str, int], budget: int, top: int) -> float:
    """The largest value if ranks were any numbers up to `top`."""
    value, left = 0.0, float(budget)
    for site in sorted(gain, key=lambda site: gain[site] / unit[site], reverse=True):
        rank = min(float(top), left / unit[site])
        value += gain[site] * rank
        left -= rank * unit[site]
    return value


def small(cases: int, cost: Callable[[random.Random], int], levels: Sequence[int] | None) -> str:
    rng = random.Random(0)
    ratios = []
    for _ in range(cases):
        names = [f"s{i}" for i in range(rng.randint(1, 6))]
        q = list(levels[: rng.randint(1, 4)]) if levels else sorted(rng.sample(range(1, 17), 3))
        limit = {name: rng.choice([1, 4, 8, 64]) for name in names}
        unit = {name: cost(rng) for name in names}
        gain = {name: rng.lognormvariate(0, 1.5) for name in names}
        most = sum(unit[s] * max([0, *(level for level in q if level <= limit[s])]) for s in names)
        budget = int(most * rng.random())
        optimum = best(gain, unit, budget, q, limit)
        if optimum > 0:
            ranks = allocate(gain, unit, budget, q, limit)
            ratios.append(sum(gain[s] * ranks[s] for s in names) / optimum)
    optimal = sum(ratio > 1 - 1.01e-4 for ratio in ratios) / len(ratios)
    return f"{min(ratios):.3f} | {statistics.mean(ratios):.5f} | {optimal:.2%}"


def large(blocks: int, hidden: int, kv: int, inner: int, repeats: int) -> tuple[float, list[float]]:
    rng = random.Random(0)
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    unit = {f"{b}.{i}": 16 * sum(shape) for b in range(blocks) for i, shape in enumerate(shapes)}
    limit = {f"{b}.{i}": min(shape) for b in range(blocks) for i, shape in enumerate(shapes)}
    ratios, seconds = [], []
    for _ in range(repeats):
        gain = {site: rng.lognormvariate(0, 1) for site in unit}
        budget = int(rng.uniform(0.01, 0.9) * 64 * sum(unit.values()))
        start = time.perf_counter()
        ranks = allocate(gain, unit, budget, POWERS, limit)
        seconds.append(time.perf_counter() - start)
        value = sum(gain[site] * ranks[site] for site in gain)
        ratios.append(value / relaxed(gain, unit, budget, 64))
    return min(ratios), sorted(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    cases = 300 if parser.parse_args().quick else 4000
    print("| up to six sites | worst of the optimum | mean | optimal |\n|---|---|---|---|")
    print(f"| any costs, any levels | {small(cases, lambda rng: rng.randint(1, 30), None)} |")
    costs = (80, 128, 236)
    print(
        f"| costs as in a block, 1 2 4 8 | {small(cases, lambda rng: rng.choice(costs), POWERS)} |"
    )
    print(f"| equal costs, any levels | {small(cases, lambda _: 7, None)} |")
    print("\n| model | worst of the relaxed | median ms | slowest ms |\n|---|---|---|---|")
    for name, sizes in (
        ("32 blocks", (32, 4096, 4096, 11008)),
        ("80 blocks", (80, 8192, 1024, 28672)),
    ):
        ratio, seconds = large(*sizes, repeats=cases // 20)
        middle = statistics.median(seconds)
        print(f"| {name} | {ratio:.5f} | {middle * 1e3:.1f} | {seconds[-1] * 1e3:.1f} |")


if __name__ == "__main__":
    main()
