"""Seconds of a round beyond training: in one process, simulated by Flower, deployed with Flower.

    python benchmarks/rounds.py            # about ten minutes
    python benchmarks/rounds.py --quick    # four clients, two rounds of one step

FlexLoRA on the embedded miniature, nothing scored between rounds. *Ten clients*: in process,
several in a pass and one by one, and simulated on two cores, by two actors of one thread each and
by one with two. *Three clients*: in process, and deployed on this machine with a SuperLink and
three SuperNodes, TLS and keys (examples/deploy/machines.py). Who trains one client at a time with
one thread must end with the same adapter, byte by byte, which is checked.

`round` and `merge` are from rounds.jsonl, medians over all rounds but the first. `training` is what
the clients say that their training took, all together; `critical` the least that a round could take
for it: all of it where one process trains, half where two actors share it, and the longest
client's where every client has a machine. `beyond` is the round without it. `before` counts from
the command that starts the run to its first round, `after` from its last one to the end, scoring
included. Memory is the most that all processes had together, pages that several hold shared out
among them (PSS, Linux).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from polyrank.run.storage import read_update
from polyrank.sample import TASKS

sys.path[:0] = [str(Path(__file__).parent.parent / "examples" / "deploy")]

from daemons import Daemons  # noqa: E402
from machines import BIN, FLOWER, Site, Status, free_port  # noqa: E402

MIB = 2**20
LONGEST = 600.0
CATEGORIES = ("numbers", "rows", "scenes")
RECIPE = """\
name = "rounds"
rounds = {rounds}

[model]
source = "sample"
device = "cpu"

[data]
{data}
fractions = [0.8, 0.1, 0.1]

[fleet]
types = "scaled"
{fleet}

[local]
lr = 5e-3
steps = {steps}
batch = 8

[evaluation]
every = 0
examples = 4
generate = 0

[engine]
threads = {threads}
{engine}
"""
ALL = """\
source = "sample"
by = "iid"
clients = {clients}
unseen = 0"""
ONE_BY_ONE, TOGETHER = "deterministic = true", 'cohort = "auto"'
UNIFORM = 'distribution = "uniform"'
NAMED = 'clients = {numbers = "T1", rows = "T2", scenes = "T4"}'


def main() -> None:
    options = arguments()
    print(f"{options.rounds} rounds of {options.steps} steps; load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(prefix="polyrank-rounds-") as folder:
        table(ten(options, Path(folder)))
        if not options.simulated:
            table(three(options, Path(folder)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10, help="of those that are simulated")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--simulated", action="store_true", help="without the deployment")
    parser.add_argument("--wide", action="store_true", help="one actor with two threads as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(clients=4, rounds=2, steps=1)
    return options


@dataclass
class Found:
    """What was seen of a run from outside, and what its folder says."""

    name: str
    actors: int
    """So many train at once; 0: all."""
    began: float = 0.0
    ended: float = 0.0
    lines: list[float] = field(default_factory=list)
    """When each record was there."""
    rounds: list[dict] = field(default_factory=list)
    training: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of each client's training, by round."""
    memory: int = 0
    processes: int = 0
    adapter: str = ""
    load: float = 0.0

    def row(self) -> str:
        """Return its line of the table; medians over all rounds but the first."""
        later = self.rounds[1:]
        parts = []
        for one in later:
            all_, spent = one["seconds"], self.training[one["round"]]
            least = max(spent) if not self.actors else max(max(spent), sum(spent) / self.actors)
            between = all_["total"]
            parts.append((between, all_["merge"], sum(spent), least, between - least))
        cells = [statistics.median(values) for values in zip(*parts, strict=True)]
        before = self.lines[0] - self.rounds[0]["seconds"]["total"] - self.began
        numbers = [f"{x:.2f}" for x in cells] + [f"{before:.1f}"]
        numbers += [f"{self.ended - self.lines[-1]:.1f}", f"{self.memory / MIB:,.0f}"]
        return (
            f"| {self.name} | " + " | ".join(numbers) + f" | {self.processes} | {self.load:.1f} |"
        )


def table(found: Sequence[Found]) -> None:
    """Print what was found; RuntimeError if adapters differ that must not."""
    print(
        "| | round, s | merge | training | critical | beyond | before | after | memory, MiB "
        "| processes | load |\n|---|" + "---:|" * 10
    )
    for one in found:
        print(one.row())
    print(flush=True)
    one_by_one = {one.name: one.adapter for one in found if one.adapter}
    if len(set(one_by_one.values())) > 1:
        raise RuntimeError(f"the adapters differ: {one_by_one}")


# --- the runs -------------------------------------------------------------------------------------


def ten(options: argparse.Namespace, work: Path) -> list[Found]:
    """Run the clients of one data set, in process and simulated."""
    data = ALL.format(clients=options.clients)
    alone = recipe(options, work / "alone.toml", data, UNIFORM, ONE_BY_ONE)
    wide = recipe(options, work / "wide.toml", data, UNIFORM, ONE_BY_ONE, threads=2)
    cohort = recipe(options, work / "cohort.toml", data, UNIFORM, TOGETHER)
    found = [
        in_process(work / "cohort", "in process, several in a pass", cohort, checked=False),
        in_process(work / "alone", "in process, one by one", alone),
        simulated(work / "two", "simulated, 2 actors × 1 thread", alone, options.clients, 1),
    ]
    if not options.wide:
        return found
    also = simulated(work / "one", "simulated, 1 actor × 2 threads", wide, options.clients, 2)
    also.adapter = ""  # Two threads may add in another order.
    return [*found, also]


def three(options: argparse.Namespace, work: Path) -> list[Found]:
    """Run three clients that have their own data, in process and deployed."""
    rows = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["category"] in CATEGORIES and not row["unseen"]]
    write(work / "data.jsonl", rows)
    data = f'source = "{work}/data.jsonl"\nby = "category"\nunseen = 0'
    here = recipe(options, work / "here.toml", data, NAMED, ONE_BY_ONE)
    own = recipe(options, work / "own.toml", 'source = "client"', NAMED, ONE_BY_ONE)
    tomls = {}
    for name in CATEGORIES:
        (work / name).mkdir()
        write(work / name / "data.jsonl", [row for row in rows if row["category"] == name])
        tomls[name] = work / name / "client.toml"
        text = f'name = "{name}"\n\n[data]\nsource = "data.jsonl"\n'
        tomls[name].write_text(text, encoding="utf-8")
    return [
        in_process(work / "here", "in process, one by one", here),
        deployed(work / "own", "deployed, 3 SuperNodes", own, tomls),
    ]


def recipe(
    options: argparse.Namespace, file: Path, data: str, fleet: str, engine: str, threads: int = 1
) -> Path:
    text = RECIPE.format(
        rounds=options.rounds,
        steps=options.steps,
        data=data,
        fleet=fleet,
        engine=engine,
        threads=threads,
    )
    file.write_text(text, encoding="utf-8")
    return file


def write(file: Path, rows: Sequence[dict]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def in_process(work: Path, name: str, file: Path, *, checked: bool = True) -> Found:
    """Run a recipe by `polyrank run`."""
    work.mkdir()
    out = work / "run"
    with Daemons(work / "logs", FLOWER) as daemons, watched(daemons, out, name, 1) as found:
        run = daemons.start("run", [BIN / "polyrank", "run", file, "--out", out], work)
        if run.process.wait(LONGEST):
            raise RuntimeError(run.printed())
    if not checked:
        found.adapter = ""
    return found


def simulated(work: Path, name: str, file: Path, nodes: int, each: int) -> Found:
    """Run a recipe on Flower's simulation, whose actors have so many of two cores each."""
    work.mkdir()
    out, app, home = work / "run", work / "app", work / "flower"
    home.mkdir()
    write_app(file, app)
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    environment = {**FLOWER, "FLWR_HOME": str(home), **{key: str(free_port()) for key in ports}}
    sizes = f"num-supernodes={nodes} client-resources-num-cpus={each} init-args-num-cpus=2"
    with Daemons(work / "logs", environment) as daemons:

        def flwr(*words: str | Path) -> dict:
            done = subprocess.run(
                [BIN / "flwr", *words, "--format", "json"],
                cwd=work,
                env=daemons.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            answer = json.loads(done.stdout)
            if not answer.get("success", False):
                raise RuntimeError(done.stdout + done.stderr)
            return answer

        def finished() -> bool:
            (run,) = flwr("ls", "--run-id", id_)["runs"]
            status = Status(run["status"], run.get("status-details") or "")
            if status.finished and not status.completed:
                raise RuntimeError(f"{status}\n{(home / LOG).read_text()[-4000:]}")
            return status.finished

        with watched(daemons, out, name, 2 // each) as found:
            config = ("--run-config", f'app.out="{out}"', "--federation-config", sizes)
            id_ = str(flwr("run", app, *config)["run-id"])
            until(finished, out)
    return found


LOG = "local-superlink/superlink.log"


def deployed(work: Path, name: str, file: Path, tomls: dict[str, Path]) -> Found:
    """Run a recipe on a SuperLink with a SuperNode for each client.toml."""
    work.mkdir()
    out, app = work / "run", work / "app"
    write_app(file, app)
    with Site(work / "site") as site:
        for client, toml in tomls.items():
            site.start_node(client, toml)
        time.sleep(5.0)  # They connect, which is not part of a run.
        with watched(site.daemons, out, name, 0) as found:
            run = site.run(app, {"app.out": str(out)})

            def finished() -> bool:
                status = site.status(run)
                if status.finished and not status.completed:
                    raise RuntimeError(f"{status}\n{site.logs()}")
                return status.finished

            until(finished, out)
    return found


def write_app(file: Path, folder: Path) -> None:
    from polyrank.config import read
    from polyrank.flower import app_folder

    app_folder.write_app(read(file), folder)


def until(finished: Callable[[], bool], out: Path) -> None:
    """Wait for a run; asking Flower costs processor time, so first its folder is looked at."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if (out / "summary.json").exists() and finished():
            return
        time.sleep(0.2)
    finished()
    raise TimeoutError(f"no end after {LONGEST:.0f} s")


# --- watching -------------------------------------------------------------------------------------


@contextmanager
def watched(daemons: Daemons, out: Path, name: str, actors: int) -> Iterator[Found]:
    """Look at a run's folder and processes while it goes on, then read what it has written."""
    found, over = Found(name, actors), threading.Event()
    found.load = os.getloadavg()[0]
    updates = out.parent / "updates"
    updates.mkdir(exist_ok=True)
    threads = [
        threading.Thread(target=_look, args=(out, updates, found, over)),
        threading.Thread(target=_weigh, args=(daemons, found, over)),
    ]
    found.began = time.time()
    for one in threads:
        one.start()
    try:
        yield found
        found.ended = time.time()
    finally:
        over.set()
        for one in threads:
            one.join()
    found.rounds = [json.loads(line) for line in (out / "rounds.jsonl").open(encoding="utf-8")]
    for file in sorted(updates.iterdir()):
        update = read_update(file)
        found.training.setdefault(update.round, []).append(update.metrics["seconds"])
    for one in found.rounds:
        seen, there = len(found.training.get(one["round"], [])), len(one["clients"])
        if seen != there:
            raise RuntimeError(f"{name}, round {one['round']}: saw {seen} of {there} updates")
    weights = out / "adapter" / "adapter_model.safetensors"
    found.adapter = hashlib.sha256(weights.read_bytes()).hexdigest()


def _look(out: Path, updates: Path, found: Found, over: threading.Event) -> None:
    """Note when records come, and keep the updates, which are removed when a round is done."""
    while not over.wait(0.02):
        with suppress(OSError):
            for file in (out / "updates").glob("*.safetensors"):
                if not (kept := updates / file.name).exists():
                    kept.hardlink_to(file)
        with suppress(OSError):
            count = (out / "rounds.jsonl").read_bytes().count(b"\n")
            found.lines += [time.time()] * (count - len(found.lines))


def _weigh(daemons: Daemons, found: Found, over: threading.Event) -> None:
    """Note the most memory of all processes together."""
    while not over.wait(1.0):
        total, here = 0, daemons.all()
        for process in here:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        found.memory = max(found.memory, total)
        found.processes = max(found.processes, len(here))


if __name__ == "__main__":
    main()
