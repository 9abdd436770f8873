"""What it costs to measure the importance of the weights: a scored step against another.

    python benchmarks/importance.py [--model FOLDER] [--threads 1] [--repeats 9] [--quick]
    python benchmarks/importance.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16

The same clients take the same optimizer steps by `train_cohort`, with every step scored and with
none, and both take turns; the table gives the median ratio within a repetition and the interval at
which the cost is 5% at most. First it is checked that both end with the same adapters, bit by bit
on a CPU. On a machine that others use too, ``--clock cpu`` counts this process's processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import warnings
from collections.abc import Sequence

import torch
import transformers
from local_training import describe, make_clock, make_examples, make_job, make_model
from split_step import Way, alternated, ratio

from polyrank.model import LoadedModel, load_model, wrap_model
from polyrank.training import Job, LocalTraining, Scoring, scoring_interval, train_cohort
from polyrank.training.interval import interval


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    clock = make_clock(options.clock, options.device)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {options.device}, {options.threads} thread(s), {options.repeats} "
        f"repeats, {options.clock} clock\n"
    )
    model = loaded(options)
    print(f"### {describe(model, options)}\n")
    print("| clients | sites trained | metric | step | scored step | ratio | every n-th for 5% |")
    print("|---|---|---|---:|---:|---:|---:|")
    for count in sorted({1, options.clients}):
        for lowest in (0, model.spec.blocks // 2):
            jobs = make_jobs(model, options, count, lowest)
            unscored = train_cohort(model, jobs)
            ways: dict[str, Way] = {"none": lambda jobs=jobs: train_cohort(model, jobs)}
            for metric in ("channel", "paper"):
                asked = [dataclasses.replace(job, scoring=Scoring(1, metric)) for job in jobs]
                for one, other in zip(unscored, train_cohort(model, asked), strict=True):
                    if options.device == "cpu" and one.adapter.hash() != other.adapter.hash():
                        raise RuntimeError("scoring has changed what is trained")
                ways[metric] = lambda asked=asked: train_cohort(model, asked)
            seconds = alternated(ways, options.repeats, clock)
            step = statistics.median(seconds["none"]) / options.steps
            where = "all" if lowest == 0 else f"from block {lowest} of {model.spec.blocks}"
            for metric in ("channel", "paper"):
                against = ratio(seconds[metric], seconds["none"])
                mine = statistics.median(seconds[metric]) / options.steps
                print(
                    f"| {count} | {where} | {metric} | {1000 * step:,.0f} ms | "
                    f"{1000 * mine:,.0f} ms | {against:.3f} | {interval(against - 1)} |",
                    flush=True,
                )
    ranks = dict.fromkeys(model.spec.shapes, options.rank)
    found = scoring_interval(
        model, ranks=ranks, rows=options.batch, length=options.length, clock=clock
    )
    print(f"\n`scoring_interval` for one client: {found}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model; default: a random Llama")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest example")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        sizes = {"hidden": 32, "layers": 4, "vocabulary": 128, "length": 32}
        vars(options).update(sizes, batch=2, steps=2, clients=2, repeats=2)
    return options


def loaded(options: argparse.Namespace) -> LoadedModel:
    if options.model:
        return load_model(options.model, device=options.device, dtype=options.dtype)
    made = make_model(options, options.device)
    module = made.module.to(getattr(torch, options.dtype))
    return wrap_model(module, made.tokenizer, source=made.source)


def make_jobs(
    model: LoadedModel, options: argparse.Namespace, count: int, lowest: int
) -> Sequence[Job]:
    """Return clients of equal ranks that train the sites from block `lowest` on, the others at 0.

    Half of each row's tokens have loss.
    """
    local = LocalTraining(batch=options.batch)
    below = [site.name for site in model.spec.sites if site.block < lowest]
    jobs = []
    for k in range(count):
        rows = make_examples(
            model, options.batch * options.steps, options.length, options.length // 2, k
        )
        job = make_job(model, f"client {k}", options.rank, rows, local)
        start = {
            site: delta.prefix(0) if site in below else delta
            for site, delta in job.assignment.start.items()
        }
        assignment = dataclasses.replace(job.assignment, start=type(job.assignment.start)(start))
        jobs.append(dataclasses.replace(job, assignment=assignment))
    return jobs


if __name__ == "__main__":
    main()
