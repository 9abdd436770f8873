"""A split step between processes: over loopback, and through a slow line with more in flight.

    python benchmarks/split_link.py                  # the miniature and a Llama of 34 M; minutes
    python benchmarks/split_link.py --quick          # a tiny model, to see that it runs
    python benchmarks/split_link.py --model FOLDER   # or --hidden, --layers, … for a random Llama
    python benchmarks/split_link.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16

One client. *Whole* is `train_cohort`; *in process* is the same client cut in two by `train_split`,
whose link writes and reads every message as bytes; *loopback* is the client in this process and the
split server in another, joined by gRPC over TLS, as in a deployment. All take turns; given are
medians over optimizer steps, after warm-up and without set-up. Beside them the processor time that
each of the two processes spends on a step: what is left of a step's seconds is waiting.

Then the same through a proxy, a third process, which lets so many bits a second through and delays
them by so many seconds, each way: with more and more microbatches in flight, beside what the cost
model foresees for such a line from the whole step's speed.

First it is checked that the cut client learns the same over the network as in process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import transformers
from local_training import describe, make_job, make_model

from polyrank.algebra import Adapter
from polyrank.data.types import Encoded
from polyrank.model import LoadedModel, load_model
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.workload import Workload
from polyrank.sample import MODEL
from polyrank.split_server.interface import OpenRound
from polyrank.split_server.process import SplitServerProcess
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training import Job, LocalTraining, Trained, train_cohort
from polyrank.training.split import SplitJob, SplitSettings, train_client_part, train_split
from polyrank.transport import InProcessLinks
from polyrank.transport.remote import Credentials, GrpcLink

NAME = "client"
WIRES = ("float32", "bf16")
IN_FLIGHT = (1, 2, 4, 8)
SECONDS = 600.0
"""How long a client may take, in all."""
PROXY = """
import json, sys
from proxy import Proxy
target, delay, rate = sys.argv[1:]
with Proxy(target, delay=float(delay), rate=float(rate) or None) as proxy:
    print(proxy.address, flush=True)
    for _ in sys.stdin:
        print(json.dumps(proxy.carried), flush=True)
"""
"""A process with the tests' proxy; it prints its address, and its counts for every line it gets."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.device}, {options.threads} "
        f"thread(s) a process, {options.repeats} × {options.steps} steps, "
        f"{options.warm} more to warm up\n"
    )
    with tempfile.TemporaryDirectory(prefix="polyrank-link-") as folder:
        for source in sources(options, Path(folder)):
            measure(source, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model, instead of the two")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …: of client and server")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=WIRES)
    parser.add_argument("--cut", type=int, default=0, help="default: a quarter of the blocks")
    parser.add_argument("--length", type=int, default=64, help="tokens of every example")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8, help="microbatches on the slow line")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mbit", type=float, default=100.0, help="of the slow line, each way")
    parser.add_argument("--delay", type=float, default=0.020, help="seconds, each way")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        sizes = {"hidden": 32, "layers": 4, "vocabulary": 128, "length": 16, "accumulation": 4}
        vars(options).update(sizes, steps=2, warm=1, repeats=1, delay=0.005)
    return options


def sources(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    """Return the folders of the models that are measured."""
    if options.model:
        yield Path(options.model)
        return
    if not options.quick:
        yield MODEL
    made = make_model(options, "cpu")
    made.module.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    yield folder


@dataclass(frozen=True)
class Setup:
    """A model, twice: here and in the split server's process."""

    model: LoadedModel
    server: SplitServerProcess
    cut: CutPoint
    wire: str
    options: argparse.Namespace

    def job(self, accumulation: int, steps: int) -> Job:
        """Return the client's work: so many optimizer steps, all rows of one length."""
        o, draw = self.options, torch.Generator().manual_seed(1)
        count = steps * accumulation * o.batch
        ids = torch.randint(4, self.model.spec.vocabulary, (count, o.length), generator=draw)
        half = o.length // 2
        rows = [Encoded(tuple(row), half, half, i) for i, row in enumerate(ids.tolist())]
        local = LocalTraining(batch=o.batch, accumulation=accumulation)
        return make_job(self.model, NAME, o.rank, rows, local)


@dataclass(frozen=True)
class Taken:
    """Seconds of each step, processor seconds of a step here and at the server, what was learned.

    `bytes` are those of a connection of the whole run, up and down, TLS and all, where it is known.
    """

    steps: Sequence[float]
    here: float
    there: float
    trained: Trained
    bytes: tuple[int, int] = (0, 0)


class Watch:
    """Notes when each optimizer step is done, and what the processes have spent by then."""

    def __init__(self, setup: Setup):
        self._cuda = setup.model.device.type == "cuda"
        self._warm, self._server = setup.options.warm, setup.server.pid
        self._marks: list[tuple[float, float, float]] = []

    def __call__(self) -> None:
        """A step is done."""
        if self._cuda:
            torch.cuda.synchronize()
        times = psutil.Process(self._server).cpu_times() if self._server else None
        there = times.user + times.system if times else 0.0
        self._marks.append((time.perf_counter(), time.process_time(), there))

    def taken(self, trained: Trained, nbytes: tuple[int, int] = (0, 0)) -> Taken:
        """Return what was noted, without the first steps."""
        if trained.failure is not None:
            raise RuntimeError(trained.failure)
        marks = self._marks[self._warm - 1 :]
        steps = [after[0] - before[0] for before, after in pairwise(marks)]
        here, there = ((marks[-1][i] - marks[0][i]) / len(steps) for i in (1, 2))
        return Taken(steps, here, there, trained, nbytes)


# --- the ways -------------------------------------------------------------------------------------


def whole(setup: Setup, job: Job) -> Taken:
    """Train the client uncut."""
    watch = Watch(setup)
    (trained,) = train_cohort(setup.model, [job], watch)
    return watch.taken(trained)


def in_process(setup: Setup, job: Job, in_flight: int) -> Taken:
    """Train it cut, both ends here."""
    watch, most = Watch(setup), setup.options.batch * setup.options.length
    (trained,) = train_split(
        setup.model,
        [SplitJob(job, setup.cut, round=1)],
        settings_of(setup, in_flight),
        lambda server_part: (
            InProcessLinks(server_part, setup.wire, setup.model.spec.hidden, most).link
        ),
        cohort=1,
        on_step=watch,
    )
    return watch.taken(trained)


def loopback(setup: Setup, job: Job, in_flight: int, delay: float = 0.0, mbit: float = 0) -> Taken:
    """Train it cut, the server in its own process, through a proxy that counts and may hinder."""
    one = SplitJob(job, setup.cut, round=1)
    access = opened(setup, one)
    watch = Watch(setup)
    with between(access.address, delay, mbit * 1e6 / 8) as (address, carried):
        trained = train_client_part(
            setup.model,
            one.at_client(setup.model),
            GrpcLink(replace(access, address=address)),
            settings_of(setup, in_flight),
            on_step=watch,
        )
        return watch.taken(trained, carried())


def direct(setup: Setup, job: Job, in_flight: int) -> Taken:
    """Train it cut, the server in its own process and nothing between."""
    one = SplitJob(job, setup.cut, round=1)
    link = GrpcLink(opened(setup, one))
    watch = Watch(setup)
    settings = settings_of(setup, in_flight)
    return watch.taken(
        train_client_part(setup.model, one.at_client(setup.model), link, settings, on_step=watch)
    )


def settings_of(setup: Setup, in_flight: int) -> SplitSettings:
    return SplitSettings(wire=setup.wire, in_flight=in_flight)  # type: ignore[arg-type]


def opened(setup: Setup, one: SplitJob) -> Credentials:
    """Return the way to a new server part of the client."""
    server_part = one.at_server(setup.model)
    most = setup.options.batch * setup.options.length
    work = OpenRound(1, 0, [server_part], Adapter({}), {NAME: most}, SECONDS)
    found = setup.server.open(work)[NAME]
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@contextmanager
def between(target: str, delay: float, rate: float) -> Iterator[tuple[str, object]]:
    """Run the proxy in a process of its own; yield its address, and what asks for its counts."""
    tests = str(Path(__file__).parent.parent / "tests")
    with subprocess.Popen(
        [sys.executable, "-c", PROXY, target, str(delay), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": tests},
    ) as process:
        said, asked = process.stdout, process.stdin
        if said is None or asked is None:
            raise RuntimeError("the proxy has no pipes")

        def carried() -> tuple[int, int]:
            print("counts", file=asked, flush=True)
            counts = json.loads(said.readline())
            return counts["up"], counts["down"]

        try:
            yield said.readline().strip(), carried
        finally:
            process.terminate()


# --- the tables -----------------------------------------------------------------------------------


def measure(source: Path, options: argparse.Namespace) -> None:
    """Print all tables of a model."""
    model = load_model(source, device=options.device, dtype=options.dtype)
    cut = CutPoint(options.cut or max(1, model.spec.blocks // 4))
    print(f"### {describe(model, options)}; cut at {cut} of {model.spec.blocks}\n", flush=True)
    for wire in options.wires:
        settings = SplitServerSettings(
            HostedModel(str(source), cut.lower, device=options.device, dtype=options.dtype),
            run="benchmark",
            split=SplitSettings(wire=wire),
            deterministic=True,
            threads=options.threads,
        )
        with SplitServerProcess(settings) as server:
            setup = Setup(model, server, cut, wire, options)
            check(setup)
            steps(setup)
            slow_line(setup)


def check(setup: Setup) -> None:
    """Raise RuntimeError if the client learns something else over the network than in process."""
    job = setup.job(1, 2)
    one = replace(setup, options=argparse.Namespace(**{**vars(setup.options), "warm": 1}))
    near, far = in_process(one, job, 1).trained, direct(one, job, 1).trained
    gap = abs(near.metrics["loss"] - far.metrics["loss"])
    apart = sum((near.adapter[s] - d).norm() ** 2 for s, d in far.adapter.items()) ** 0.5
    moved = sum((d - job.assignment.start[s]).norm() ** 2 for s, d in far.adapter.items()) ** 0.5
    if gap > 1e-3 or apart > 1e-2 * moved:
        raise RuntimeError(f"not the same training: losses {gap:.1e}, ΔW {apart / moved:.1e} apart")


def steps(setup: Setup) -> None:
    """Print a step's seconds, whole, cut in process, and cut over loopback; and its bytes."""
    o = setup.options
    for accumulation, in_flight in ((1, 1), (o.accumulation, 2)):
        job = setup.job(accumulation, o.steps + o.warm)
        ways = {
            "whole": lambda job=job: whole(setup, job),
            "in process": lambda job=job, m=in_flight: in_process(setup, job, m),
            "loopback": lambda job=job, m=in_flight: direct(setup, job, m),
        }
        found = repeated(ways, o.repeats)
        tokens = accumulation * o.batch * o.length
        print(
            f"**{setup.wire}, {accumulation} microbatch(es) of {o.batch * o.length} tokens a step, "
            f"{in_flight} in flight**\n\n"
            "| way | step, ms | tokens/s | of whole | processor here, ms | at the server, ms |\n"
            "| --- | ---: | ---: | ---: | ---: | ---: |"
        )
        for name, runs in found.items():
            step = middle(runs)
            against = ratio(runs, found["whole"])
            there = f"{1e3 * statistics.median(r.there for r in runs):,.1f}"
            print(
                f"| {name} | {1e3 * step:,.1f} | {tokens / step:,.0f} | {against:.2f} "
                f"| {1e3 * statistics.median(r.here for r in runs):,.1f} "
                f"| {there if name == 'loopback' else '–'} |"
            )
        print()
    traffic(setup)


def traffic(setup: Setup) -> None:
    """Print the bytes of a step: by the cost model, in frames, and on the connection."""
    o = setup.options
    short, long = (setup.job(o.accumulation, count) for count in (1 + o.warm, 5 + o.warm))
    a, b = (loopback(setup, job, 2) for job in (short, long))
    wire = costs(setup, o.accumulation, 2).wire(setup.cut)
    print("| bytes a step | cost model | frames | of it | on the connection | of it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for i, (way, foreseen) in enumerate((("up", wire.up), ("down", wire.down))):
        # The difference of two runs leaves out how a connection begins and ends.
        frames = (b.trained.metrics[f"wire_{way}"] - a.trained.metrics[f"wire_{way}"]) / 4
        there = (b.bytes[i] - a.bytes[i]) / 4
        print(
            f"| {way} | {foreseen:,} | {frames:,.0f} | {frames / foreseen:.4f} "
            f"| {there:,.0f} | {there / foreseen:.4f} |"
        )
    print(flush=True)


def slow_line(setup: Setup) -> None:
    """Print what microbatches in flight gain on the slow line, and what the cost model foresees."""
    o = setup.options
    job = setup.job(o.accumulation, o.steps + o.warm)
    few = [one for one in IN_FLIGHT if one <= o.accumulation]
    ways = {"whole": lambda: whole(setup, job)} | {
        m: lambda m=m: loopback(setup, job, m, o.delay, o.mbit) for m in few
    }
    found = repeated(ways, o.repeats)
    tokens = o.accumulation * o.batch * o.length
    speed = costs(setup, o.accumulation, 1).operations(ranks(setup), None).client
    # By processor time where that is the work: others may use the machine too.
    work = statistics.median(run.here for run in found["whole"])
    flops = speed / (work if o.device == "cpu" else middle(found["whole"]))
    device = DeviceProfile(
        "client", 2**40, flops, up=o.mbit * 1e6 / 8, down=o.mbit * 1e6 / 8, latency=o.delay
    )
    server = DeviceProfile("server", 2**40, flops)
    foreseen = {
        m: costs(setup, o.accumulation, m).seconds(ranks(setup), setup.cut, device, server, 1).step
        for m in few
    }
    print(
        f"**{setup.wire}, {o.mbit:g} Mbit/s and {1e3 * o.delay:g} ms each way, {o.accumulation} "
        f"microbatches of {o.batch * o.length} tokens a step** (whole: "
        f"{1e3 * middle(found['whole']):,.0f} ms)\n\n"
        "| in flight | step, ms | tokens/s | gain | foreseen, ms | gain | measured / foreseen |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for m in few:
        step, gain = middle(found[m]), 1 / ratio(found[m], found[1])
        print(
            f"| {m} | {1e3 * step:,.0f} | {tokens / step:,.0f} | {gain:.2f} "
            f"| {1e3 * foreseen[m]:,.0f} | {foreseen[1] / foreseen[m]:.2f} "
            f"| {step / foreseen[m]:.2f} |"
        )
    print(flush=True)


def costs(setup: Setup, accumulation: int, in_flight: int) -> CostModel:
    o = setup.options
    load = Workload(
        o.batch,
        o.length,
        o.length // 2,
        accumulation=accumulation,
        itemsize=setup.model.dtype.itemsize,
        wire=setup.wire,
        in_flight=in_flight,
    )
    return CostModel(anatomy_of(setup.model), setup.model.spec, load)


def ranks(setup: Setup) -> dict[str, int]:
    return dict.fromkeys(setup.model.spec.shapes, setup.options.rank)


def repeated(ways: dict, repeats: int) -> dict:
    """Return what each way took, all taking turns; each repetition begins with another."""
    found = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(ways[name]())
    return found


def middle(runs: Sequence[Taken]) -> float:
    """Return the median seconds of a step."""
    return statistics.median(seconds for run in runs for seconds in run.steps)


def ratio(of: Sequence[Taken], to: Sequence[Taken]) -> float:
    """Return the median over repetitions of how many times as long a step takes."""
    return statistics.median(middle([a]) / middle([b]) for a, b in zip(of, to, strict=True))


if __name__ == "__main__":
    main()
