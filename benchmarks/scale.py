"""Thousands of clients: does memory depend on how many there are, or on how many rounds were run?

    python benchmarks/scale.py                              # 160 and 1,613 clients, 50 rounds each
    python benchmarks/scale.py --quick                      # a minute
    python benchmarks/scale.py --clients 100 1000 --rounds 20 --examples 50

Each size runs in a process of its own, on one thread, the way a user would run it: a JSON-lines
file -> `load_tasks` -> `partition` -> `Fleet` -> `Federation`, whose rounds are then run. Every
client has its own examples of real text, drawn from the kit's Natural Instructions if it is there
(``--texts``), otherwise from the embedded tasks, and tokenised. The model is the embedded
miniature. Local training is one short step, so that what is measured is the run around it.

Peak is `ru_maxrss` of the process, in MiB. "After round N" is the resident memory at that moment,
and in brackets what of it is in use: the C allocator keeps freed memory, which ``mallinfo2`` tells.
Seconds are medians over the rounds, by phase; `write` is what a round takes beyond the phases of
its record: its line and its checkpoint. Printed are tables in Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KIT = Path("../shared/kit/natural_instructions/tasks.jsonl.gz")
PHASES = ("train", "merge", "evaluate", "write", "total")
STARTS = ("load", "partition", "prepare", "base")


def main() -> None:
    given = arguments()
    if given.child:
        print(json.dumps(run(given.clients[0], given)))
        return
    found = [child(clients, given) for clients in given.clients]
    import torch

    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread; {given.examples} examples a "
        f"client, {given.sampled} clients a round, {given.rounds} rounds\n"
    )
    tables(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[160, 1613])
    parser.add_argument("--examples", type=int, default=200, help="of each client")
    parser.add_argument("--sampled", type=int, default=80, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--evaluated", type=int, default=40, help="clients of an evaluation")
    parser.add_argument("--texts", type=Path, default=KIT, help="rows to draw examples from")
    parser.add_argument("--quick", action="store_true", help="40 and 400 clients, 10 rounds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.clients, given.examples, given.sampled = [40, 400], 40, 8
        given.rounds, given.evaluated = 10, 8
    return given


def child(clients: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return what a process of its own measured with so many clients."""
    options = {
        "clients": clients,
        "examples": given.examples,
        "sampled": given.sampled,
        "rounds": given.rounds,
        "evaluated": given.evaluated,
        "texts": given.texts,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    print(f"{clients} clients …", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_tasks(path: Path, clients: int, examples: int, texts: Path) -> None:
    """Write one task per client; a client's rows depend on its number alone, not on `clients`."""
    from polyrank.sample import TASKS

    source = texts if texts.is_file() else TASKS
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        pool = [json.loads(line) for line in file]
    kept = ("category", "instruction", "input", "output")
    with path.open("w", encoding="utf-8") as file:
        for number in range(clients):
            draw = random.Random(number)
            for row in draw.choices(pool, k=examples):
                made = {"task": f"task{number:05}"} | {name: row[name] for name in kept}
                file.write(json.dumps(made, ensure_ascii=False) + "\n")


def run(clients: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of a run in this process."""
    with tempfile.TemporaryDirectory(prefix="polyrank-") as folder:
        path = Path(folder) / "tasks.jsonl"
        write_in_another(path, clients, given)
        return measured(path, clients, given, Path(folder) / "run")


def write_in_another(path: Path, clients: int, given: argparse.Namespace) -> None:
    """Write the file in a process of its own, whose memory is not counted."""
    words = [str(path), str(clients), str(given.examples), str(given.texts)]
    code = (
        "import sys, runpy; from pathlib import Path; p, c, e, t = sys.argv[2:]; "
        "runpy.run_path(sys.argv[1])['write_tasks'](Path(p), int(c), int(e), Path(t))"
    )
    subprocess.run([sys.executable, "-c", code, __file__, *words], check=True)


def measured(path: Path, clients: int, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    import torch

    import polyrank as pr
    from polyrank.sample import MODEL

    torch.set_num_threads(1)
    model = pr.load_model(str(MODEL))
    imported = resident()
    starts: dict[str, float] = {}
    peaks: dict[str, float] = {"imports and model": peak()}

    def lap(name: str, began: float) -> float:
        starts[name], peaks[name] = time.perf_counter() - began, peak()
        return time.perf_counter()

    now = time.perf_counter()
    tasks = pr.load_tasks(path)
    now = lap("load", now)
    population = pr.partition(tasks, by="task", unseen=0.05, seed=0)
    now = lap("partition", now)
    fleet = pr.Fleet.sample(population.seen, "heavy-tail-light", types="scaled", seed=0)
    run_settings = pr.RunSettings(
        sampling=pr.Sampling(number=given.sampled),
        encoding=pr.Encoding(max_length=128, too_long="cut-prompt"),
        evaluation=pr.Evaluation(
            every=10, examples=4, clients=given.evaluated, final_clients=given.evaluated
        ),
    )
    local = pr.LocalTraining(epochs=None, steps=1, batch=2, lr=1e-3)
    run = pr.Federation(model, population, fleet, local=local, settings=run_settings).open(out)
    now = lap("prepare", now)
    with run:
        run.base()
        now = lap("base", now)
        rows = sum(len(part) for client in run.work.values() for part in client.rows.values())
        seconds: list[dict[str, float]] = []
        after = {}
        for record in run.rounds(given.rounds):
            wall = time.perf_counter() - now
            now = time.perf_counter()
            spent = {**record.seconds, "total": wall, "write": wall - record.seconds["total"]}
            seconds.append({**spent, "evaluated": record.evaluation is not None})
            if record.round == 1 or record.round % 10 == 0:
                after[record.round] = (resident(), resident() - kept_free())
        run.finish()
    return {
        "clients": clients,
        "rows": rows,
        "file": path.stat().st_size / 2**20,
        "imported": imported,
        "starts": starts,
        "peaks": peaks,
        "peak": peak(),
        "after": after,
        "seconds": {
            phase: statistics.median(
                [
                    one.get(phase, 0.0)
                    for one in seconds
                    if one["evaluated"] or phase not in ("evaluate",)
                ]
                or [0.0]
            )
            for phase in PHASES
        },
    }


def peak() -> float:
    """MiB of resident memory at the most, since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def resident() -> float:
    """MiB of resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def kept_free() -> float:
    """MiB that the C allocator holds free; 0 where it is not glibc's."""
    names = [
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    ]

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0.0
    mallinfo.restype = Info
    return mallinfo().fordblks / 2**20


def tables(found: list[dict[str, Any]]) -> None:
    first = found[0]
    print("| clients | examples | file, MiB | peak, MiB | against the first |")
    print("|---:|---:|---:|---:|---:|")
    for one in found:
        print(
            f"| {one['clients']:,} | {one['rows']:,} | {one['file']:.0f} | {one['peak']:.0f} | "
            f"{one['peak'] / first['peak']:.3f} |"
        )
    rounds = list(first["after"])
    print("\nResident memory, MiB (in use):\n")
    print(f"| clients | model loaded | {' | '.join(f'after round {n}' for n in rounds)} |")
    print("|---:" * (2 + len(rounds)) + "|")
    for one in found:
        after = " | ".join("{:.0f} ({:.0f})".format(*one["after"][n]) for n in rounds)
        print(f"| {one['clients']:,} | {one['imported']:.0f} | {after} |")
    print("\nPeak memory so far, MiB, and seconds before the first round:\n")
    print(f"| clients | {' | '.join(f'{name}' for name in first['peaks'])} |")
    print("|---:" * (1 + len(first["peaks"])) + "|")
    for one in found:
        told = [
            f"{mib:.0f}" + (f" ({one['starts'][name]:.1f} s)" if name in one["starts"] else "")
            for name, mib in one["peaks"].items()
        ]
        print(f"| {one['clients']:,} | {' | '.join(told)} |")
    print("\nSeconds a round (`evaluate`: of the rounds that are evaluated):\n")
    print(f"| clients | {' | '.join(PHASES)} |")
    print("|---:" * (1 + len(PHASES)) + "|")
    for one in found:
        told = " | ".join(f"{one['seconds'][phase]:.2f}" for phase in PHASES)
        print(f"| {one['clients']:,} | {told} |")


if __name__ == "__main__":
    main()
