"""Split training in one process: what the cut costs in time, what it sends, and the server alone.

    python benchmarks/split_step.py [--model FOLDER] [--threads 1] [--repeats 5] [--quick]
    python benchmarks/split_step.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16

Three tables. *A split step against the whole one*: the same clients on the same batches by
`train_cohort`, and cut in two by `train_split` over links of this process, which write and read
every message as bytes. *Eight clients at the server*: its time alone, on activations recorded
before, for one call of `ServerParts.answer` for all clients against a call for each. *Bytes*: what
the links have counted, against what an uncut bf16 exchange of activations and gradients would take.

All ways take turns in each repetition, in another order each time; the tables give medians and the
median ratio within a repetition. First it is checked that cut and uncut clients learn the same. On
a machine that others use too, ``--clock cpu`` counts this process's processor time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers
from local_training import SCALE, describe, make_clock, make_examples, make_job, make_model

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter
from polyrank.codecs import codec
from polyrank.model import Cut, LoadedModel, load_model, wrap_model
from polyrank.planning import CutPoint
from polyrank.training import Job, LocalTraining, Trained, train_cohort
from polyrank.training.batches import assemble
from polyrank.training.split import (
    Activations,
    RequestId,
    Returned,
    ServerPartJob,
    ServerParts,
    SplitJob,
    SplitSettings,
    Step,
    Stepped,
    train_split,
)
from polyrank.training.split.packing import PackedRows
from polyrank.transport import InProcessLinks

WIRES = ("float32", "bf16", "int8")
Way = Callable[[], object]
Clock = Callable[[], float]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    device, clock = options.device, make_clock(options.clock, options.device)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {device}, {options.threads} thread(s), {options.repeats} repeats, "
        f"{options.clock} clock\n"
    )
    model = loaded(options)
    print(f"### {describe(model, options)}\n")
    steps(model, options, clock)
    server_parts(model, options, clock)
    traffic(model, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model; default: a random Llama")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest example")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        sizes = {"hidden": 32, "layers": 4, "vocabulary": 128, "length": 32}
        vars(options).update(sizes, batch=2, steps=2, clients=3, repeats=2)
    return options


def loaded(options: argparse.Namespace) -> LoadedModel:
    if options.model:
        return load_model(options.model, device=options.device, dtype=options.dtype)
    made = make_model(options, options.device)
    module = made.module.to(getattr(torch, options.dtype))
    return wrap_model(module, made.tokenizer, source=made.source)


def make_jobs(model: LoadedModel, options: argparse.Namespace, count: int, steps: int) -> list[Job]:
    """Return clients of unequal ranks with random rows, half of each row's tokens with loss."""
    local = LocalTraining(batch=options.batch)
    jobs = []
    for k in range(count):
        rank = max(1, options.rank * 2 // 2 ** (k % 4)) if count > 1 else options.rank
        rows = make_examples(model, options.batch * steps, options.length, options.length // 2, k)
        jobs.append(make_job(model, f"client {k}", rank, rows, local))
    return jobs


def alternated(ways: Mapping[str, Way], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Return the seconds of each way, all taking turns; each repetition begins with another."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


# --- a split step against the whole one -----------------------------------------------------------


def split(model: LoadedModel, jobs: Sequence[Job], cut: CutPoint, wire: str) -> list[Trained]:
    settings = SplitSettings(wire=wire)
    most = max(len(row.input_ids) for job in jobs for row in job.examples) * jobs[0].local.batch
    return train_split(
        model,
        [SplitJob(job, cut, round=1) for job in jobs],
        settings,
        lambda server_part: InProcessLinks(server_part, wire, model.spec.hidden, most).link,
        cohort=len(jobs),
    )


def cuts_of(model: LoadedModel) -> tuple[CutPoint, CutPoint, CutPoint]:
    """Return a cut at a quarter of the blocks, one at half, and a U-shape of the outer quarters."""
    blocks = model.spec.blocks
    quarter = max(1, blocks // 4)
    return CutPoint(quarter), CutPoint(max(2, blocks // 2)), CutPoint(quarter, blocks - quarter)


def steps(model: LoadedModel, options: argparse.Namespace, clock: Clock) -> None:
    """Print tokens per second of clients that are cut, and how much longer than whole they take."""
    for count in sorted({1, options.clients}):
        jobs = make_jobs(model, options, count, options.steps)
        whole = train_cohort(model, jobs)
        ways: dict[str, Way] = {"whole": lambda jobs=jobs: train_cohort(model, jobs)}
        notes = []
        quarter, half, ends = cuts_of(model)
        for cut, wire in [(c, w) for c in (quarter, half) for w in WIRES] + [(ends, "bf16")]:
            name = f"cut {cut} of {model.spec.blocks}, {wire}"
            notes.append(f"{name}: {compared(whole, split(model, jobs, cut, wire), jobs, wire)}")
            ways[name] = lambda jobs=jobs, c=cut, w=wire: split(model, jobs, c, w)
        seconds = alternated(ways, options.repeats, clock)
        tokens = sum(one.metrics["tokens"] for one in whole)
        noun = "client" if count == 1 else "clients"
        print(f"| {count} {noun} | tokens/s | seconds against whole |")
        print("| --- | ---: | ---: |")
        for name, taken in seconds.items():
            against = ratio(taken, seconds["whole"])
            print(f"| {name} | {tokens / statistics.median(taken):,.0f} | {against:.2f} |")
        print("\n" + "\n".join(f"- {note}" for note in notes) + "\n", flush=True)


def compared(whole: list[Trained], parts: list[Trained], jobs: list[Job], wire: str) -> str:
    """Return how far apart uncut and cut clients end; RuntimeError if it is not the same work."""
    gap = moved = apart = 0.0
    for one, other, job in zip(whole, parts, jobs, strict=True):
        if other.failure is not None:
            raise RuntimeError(other.failure)
        gap = max(gap, abs(one.metrics["loss"] - other.metrics["loss"]))
        start = {s: d.to(device=one.adapter[s].b.device) for s, d in job.assignment.start.items()}
        apart += sum((one.adapter[s] - other.adapter[s]).norm() ** 2 for s in start)
        moved += sum((one.adapter[s] - start[s]).norm() ** 2 for s in start)
    relative = (apart / moved) ** 0.5
    # A lossy wire is measured, not judged; a lossless one must change rounding alone.
    if not gap < 0.1 or (wire == "float32" and (gap > 1e-3 or relative > 0.02)):
        raise RuntimeError(f"not the same training: losses {gap:.1e}, ΔW {relative:.1e} apart")
    return f"mean losses at most {gap:.1e} apart, what was learned {relative:.1e} of its norm"


# --- the server's time alone ----------------------------------------------------------------------


def server_parts(model: LoadedModel, options: argparse.Namespace, clock: Clock) -> None:
    """Print the server's time for all clients in one call against a call for each."""
    count, steps = options.clients, options.steps
    jobs = make_jobs(model, options, count, steps)
    print(f"| server, {count} clients | in turn, tokens/s | in one call, tokens/s | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for cut in cuts_of(model)[:2]:
        recorded = [[record(model, job, cut, step) for job in jobs] for step in range(steps)]
        tokens = sum(sum(one.lengths) for each in recorded for one in each)
        for shared in (False, True):
            mine = one_assignment(jobs) if shared else jobs
            served = [server_job(model, job, cut, steps) for job in mine]
            seconds = alternated_tails(model, served, recorded, shared, options.repeats, clock)
            speeds = [tokens / statistics.median(seconds[name]) for name in ("each", "all")]
            against = ratio(seconds["each"], seconds["all"])
            what = "one shared set" if shared else "own adapters, unequal ranks"
            print(
                f"| {what}, cut {cut} of {model.spec.blocks} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
                f"| {against:.2f} |",
                flush=True,
            )
    print()


def alternated_tails(
    model: LoadedModel,
    jobs: Sequence[ServerPartJob],
    recorded: Sequence[Sequence[Activations]],
    shared: bool,
    repeats: int,
    clock: Clock,
) -> dict[str, list[float]]:
    """Return the seconds of answering everything, without set-up, and check that both do the same.

    ``all`` has every client's request in one call, ``each`` one in a call.
    """
    seconds: dict[str, list[float]] = {"each": [], "all": []}
    trained: dict[str, list[Adapter]] = {}
    for repeat in range(repeats):
        for name in ("each", "all") if repeat % 2 else ("all", "each"):
            with ServerParts(model, jobs, shared=shared) as end:
                start = clock()
                for requests in recorded:
                    calls = [[one] for one in requests] if name == "each" else [requests]
                    for call in calls:
                        expect(end.answer(call), Returned)
                    asked = [Step(one.id, 1.0) for one in requests]
                    # A shared set takes its step once all have asked, so they ask together.
                    alone = name == "each" and not shared
                    for step in [[one] for one in asked] if alone else [asked]:
                        expect(end.answer(step), Stepped)
                seconds[name].append(clock() - start)
                trained[name] = [end.adapter(job.client) for job in jobs]
    for one, other in zip(trained["each"], trained["all"], strict=True):
        apart = max(float((one[site] - other[site]).norm() / one[site].norm()) for site in one)
        # A base in bfloat16 rounds a larger batch in other places.
        if apart > (0.02 if model.dtype == torch.float32 else 0.3):
            raise RuntimeError(f"in turn the server's updates differ by {apart:.1e}")
    return seconds


def expect(replies: Sequence[object], kind: type) -> None:
    """Raise RuntimeError if a request was refused, for then nothing was measured."""
    wrong = [reply for reply in replies if not isinstance(reply, kind)]
    if wrong:
        raise RuntimeError(f"the server answered {wrong[0]}")


def record(model: LoadedModel, job: Job, cut: CutPoint, step: int) -> Activations:
    """Return what a client sends for a step of one microbatch, by the bare base's first blocks."""
    rows = job.examples[step * job.local.batch : (step + 1) * job.local.batch]
    batch = assemble(rows, model.tokenizer.pad_token_id, model.device)
    packing = PackedRows([len(row.input_ids) for row in rows], model.device)
    labels = torch.full((batch.input_ids.numel(),), -100, device=model.device)
    labels[batch.positions] = batch.targets
    with torch.no_grad():
        states = packing.packed(Cut(model, cut.lower).head(batch.input_ids))
    at = RequestId(job.client, 1, 0, step)
    lengths = tuple(packing.lengths)
    weight = 1.0 / len(batch.targets)
    # As they come off the wire: float32, in the memory of the processor.
    return Activations(at, True, weight, lengths, states.float().cpu(), labels[packing.index].cpu())


def server_job(model: LoadedModel, job: Job, cut: CutPoint, steps: int) -> ServerPartJob:
    server = cut.at_server(model.spec.blocks)
    own = job.assignment.only({site.name for site in model.spec.sites if site.block in server})
    return ServerPartJob(job.client, 1, 0, cut, own, job.local, job.seed, steps)


def one_assignment(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with the first one's factors, as clients of a shared set have to have."""
    first = jobs[0]
    start: Adapter = first.assignment.start
    same = Assignment(start, dict.fromkeys(start, SCALE))
    return [Job(job.client, same, job.examples, job.local, job.seed) for job in jobs]


# --- bytes ----------------------------------------------------------------------------------------


def traffic(model: LoadedModel, options: argparse.Namespace) -> None:
    """Print the bytes that links have carried, exactly, and what is not states of them."""
    (job,) = make_jobs(model, options, 1, options.steps)
    width = model.spec.hidden
    quarter, _, ends = cuts_of(model)
    print("| wire | up | down | bytes a step | of 4·tokens·d | states | beside them |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cut, wire in [(quarter, wire) for wire in WIRES] + [(ends, "bf16")]:
        metrics = split(model, [job], cut, wire)[0].metrics
        tokens, steps = int(metrics["tokens"]), metrics["steps"]
        how = codec(wire)
        # One way there and one back, and in a U-shape twice.
        pairs = 1 if cut.upper is None else 2
        rows = pairs * (how.activations.nbytes(tokens, width) + how.gradients.nbytes(tokens, width))
        both = metrics["wire_up"] + metrics["wire_down"]
        name = wire if cut.upper is None else f"{wire}, U-shape"
        print(
            f"| {name} | {metrics['wire_up']:,.0f} | {metrics['wire_down']:,.0f} | "
            f"{both / steps:,.0f} | {both / (4 * tokens * width):.4f} | {rows:,} | "
            f"{100 * (both - rows) / rows:.2f} % |"
        )
    print(
        f"\n{tokens} tokens in {steps:.0f} steps of {job.local.batch} rows, d = {width}; "
        f"2·tokens·d·2 is {4 * tokens * width:,} bytes.\n"
    )


if __name__ == "__main__":
    main()
