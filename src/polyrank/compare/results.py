"""The results of a comparison, as JSON: compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyrank.compare import statistics
from polyrank.compare.request import Request
from polyrank.compare.run import MethodRuns, SeedRun
from polyrank.compare.tuning import edge
from polyrank.run import RoundRecord, RunFolder, storage
from polyrank.run.folder import RUN
from polyrank.runner.inspect import FLEET
from polyrank.runner.runner import SUMMARY

SCHEMA = 1
GROUPS = ("seen", "unseen")
SCORES = ("loss", "exact_match", "rouge_l")
BENCHMARK = ("perplexity", "bleu", "nist", "rouge_l")
TO_TARGET = ("rounds", "bytes", "seconds", "modelled_seconds")
COSTS = ("bytes_up", "bytes_down", "seconds", "discarded")


def collect(request: Request, folder: Path, methods: Sequence[MethodRuns]) -> dict[str, Any]:
    """Return what the finished runs ended with: compare.json's content.

    ``complete`` says whether every run that was asked for is finished. Differences are those to the
    first method, on the same clients and seeds.
    """
    first, asked = methods[0], request.recipe
    held_out = None if asked.benchmark is None else {"target": asked.target_perplexity}
    wanted = len(methods) * request.seeds
    finished = sum(run.finished for method_runs in methods for run in method_runs.runs)
    return {
        "schema": SCHEMA,
        "name": request.recipe.name,
        "rounds": request.recipe.rounds,
        "seeds": request.seed_values,
        "tuned": request.tune,
        "rates": [*request.rates],
        "first": first.method.label,
        "complete": finished == wanted,
        "benchmark": held_out,
        "base": _base(methods),
        "methods": [_method(request, folder, method_runs, first) for method_runs in methods],
        "agreement": [_agreement(seed, methods) for seed in request.seed_values],
        "failures": [
            {"method": method_runs.method.label, **failure}
            for method_runs in methods
            for failure in method_runs.failures
        ],
    }


def records_of(run: Path) -> list[RoundRecord]:
    """Return a run's records."""
    return [RoundRecord.from_json(record) for record in RunFolder.peek(run).records()]


def _base(methods: Sequence[MethodRuns]) -> dict[str, Any]:
    """The bare base's scores per seed, their mean and spread; the same for all methods."""
    by_seed: dict[int, Any] = {}
    for run in (run for method_runs in methods for run in method_runs.runs if run.finished):
        if run.seed not in by_seed:
            summary = storage.read_json(run.folder / SUMMARY)
            held_out = _held_out(summary, "base")
            by_seed[run.seed] = summary["base"] | ({"benchmark": held_out} if held_out else {})
    each = [{"seed": seed, **scores} for seed, scores in sorted(by_seed.items())]
    return {"per_seed": each, **_over_seeds(each), "benchmark": _benchmark(each)}


def _method(
    request: Request, folder: Path, method_runs: MethodRuns, first: MethodRuns
) -> dict[str, Any]:
    runs = [_run(folder, run) for run in method_runs.runs]
    done = [run for run in runs if run["failure"] is None]
    return {
        "label": method_runs.method.label,
        "rule": method_runs.method.rule,
        "baseline": method_runs.method.baseline,
        "pooled": method_runs.method.pooled or request.recipe.data.pooled,
        "local_method": method_runs.method.local,
        "force": method_runs.method.force
        or request.recipe.fleet.force
        or method_runs.method.forced,
        "rate": method_runs.rate,
        "tuning": _tuning(request, method_runs) if request.tune else None,
        "runs": runs,
        **_over_seeds(done),
        "benchmark": _benchmark(done),
        "costs": {
            cost: {
                "mean": statistics.mean([run[cost] for run in done]),
                "spread": statistics.spread([run[cost] for run in done]),
            }
            for cost in COSTS
        },
        "per_category": _per_category([run.folder for run in method_runs.runs if run.finished]),
        "difference": None if method_runs is first else _difference(method_runs, first),
    }


def _over_seeds(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of every score of both groups."""

    def of(calculate: Any) -> dict[str, Any]:
        return {
            who: {score: calculate([scores[who][score] for scores in each]) for score in SCORES}
            for who in GROUPS
        }

    return {"mean": of(statistics.mean), "spread": of(statistics.spread)}


def _held_out(summary: Mapping[str, Any], when: str) -> dict[str, Any] | None:
    """A run's scores on its benchmark; None if it has none."""
    return summary["benchmark"][when] if "benchmark" in summary else None


def _benchmark(each: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean and spread over seeds on the benchmark, and of what it took to reach the target.

    The latter are over the ``reached`` runs alone. None where there is no benchmark.
    """
    benchmarks = [run["benchmark"] for run in each if run.get("benchmark") is not None]
    if not benchmarks:
        return None
    targets = [run["to_target_perplexity"] for run in each if run.get("to_target_perplexity")]

    def of(calculate: Any, keys: Sequence[str], values: Sequence[Mapping[str, Any]]) -> Any:
        return {key: calculate([run.get(key) for run in values]) for key in keys}

    return {
        "mean": of(statistics.mean, BENCHMARK, benchmarks),
        "spread": of(statistics.spread, BENCHMARK, benchmarks),
        "to_target": of(statistics.mean, TO_TARGET, targets) if targets else None,
        "reached": sum(target["rounds"] is not None for target in targets),
    }


def _run(folder: Path, run: SeedRun) -> dict[str, Any]:
    place = str(run.folder.relative_to(folder))
    if not run.finished:
        return {"seed": run.seed, "folder": place, "failure": run.failure or "not finished"}
    summary = storage.read_json(run.folder / SUMMARY)
    records = records_of(run.folder)
    evaluated = [record.validation_loss for record in records if record.evaluation is not None]
    return {
        "seed": run.seed,
        "folder": place,
        "failure": None,
        **{key: summary[key] for key in ("rounds", "result_round", "stopped")},
        "validation_loss": evaluated[-1] if evaluated else None,
        **{who: summary["final"][who] for who in GROUPS},
        **{cost: summary[cost] for cost in ("bytes_up", "bytes_down", "seconds")},
        "benchmark": _held_out(summary, "final"),
        "to_target_perplexity": summary.get("to_target_perplexity"),
        "discarded": statistics.mean([record.discarded for record in records]),
        "rejected": sum(len(record.rejected) for record in records),
        "abandoned_attempts": sum(len(record.abandoned) for record in records),
    }


def _per_category(runs: Sequence[Path]) -> dict[str, Any]:
    """Per category and group the test loss, mean and spread over seeds, and the clients there."""
    each = [storage.read_json(run / SUMMARY)["per_category"] for run in runs]
    categories: dict[str, Any] = {}
    for name in sorted({name for run in each for name in run}):
        categories[name] = {}
        for who in GROUPS:
            groups = [run[name][who] for run in each if name in run]
            losses = [group["loss"] for group in groups]
            categories[name][who] = {
                "loss": statistics.mean(losses),
                "spread": statistics.spread(losses),
                "clients": max(group["clients"] for group in groups),
            }
    return categories


def _tuning(request: Request, method_runs: MethodRuns) -> dict[str, Any]:
    """The rates that were tried, in order, and whether the best of them is an edge."""
    trials = sorted(method_runs.trials, key=lambda trial: trial.rate)
    return {
        "seed": request.recipe.seed,
        "trials": [
            {
                "rate": trial.rate,
                "validation_loss": trial.loss,
                "round": trial.round,
                "failure": trial.failure,
                "extension": trial.rate not in request.rates,
            }
            for trial in trials
        ],
        "edge": edge(trials),
    }


def _difference(method_runs: MethodRuns, first: MethodRuns) -> dict[str, Any]:
    """Per seed the paired difference to the first method, and its mean and spread over seeds."""
    theirs = {run.seed: run for run in first.runs if run.finished}
    each = [
        {"seed": run.seed, **_paired(run.folder, theirs[run.seed].folder)}
        for run in method_runs.runs
        if run.finished and run.seed in theirs
    ]
    means = [
        {who: {score: seed[who][score]["mean"] for score in SCORES} for who in GROUPS}
        for seed in each
    ]
    return {"per_seed": each, **_over_seeds(means)}


def _paired(ours: Path, theirs: Path) -> dict[str, Any]:
    """Both groups' paired differences of every score over clients, on the test parts."""
    mine, other = (storage.read_json(run / "evaluation.json")["clients"] for run in (ours, theirs))
    seen = set(storage.read_json(ours / FLEET)["clients"])
    differences: dict[str, Any] = {}
    for who in GROUPS:
        differences[who] = {}
        for score in SCORES:
            values = [
                {
                    id: scores[score]
                    for id, scores in each.items()
                    if (id in seen) == (who == "seen")
                }
                for each in (mine, other)
            ]
            pair = statistics.paired(*values)
            differences[who][score] = {"mean": pair.mean, "se": pair.se, "clients": pair.clients}
    return differences


def _agreement(seed: int, methods: Sequence[MethodRuns]) -> dict[str, Any]:
    """Whether all methods had the same data, fleet and clients in every round with this seed.

    Baselines with all training examples in one place need not have the clients.
    """
    runs = [
        (method_runs.method, run)
        for method_runs in methods
        for run in method_runs.runs
        if run.seed == seed and run.finished
    ]
    differ: list[str] = []
    if runs:
        first, reference = runs[0]
        for method, run in runs[1:]:
            pair = f"{method.label} and {first.label}"
            if _data(run.folder) != _data(reference.folder):
                differ.append(f"{pair}: other data or another model")
        federated = [(method, run) for method, run in runs if not method.pooled]
        first, reference = federated[0] if federated else runs[0]
        for method, run in federated[1:]:
            pair = f"{method.label} and {first.label}"
            pairs = zip(records_of(run.folder), records_of(reference.folder), strict=False)
            for ours, theirs in pairs:
                if (ours.attempt, ours.clients) != (theirs.attempt, theirs.clients):
                    differ.append(f"{pair}: other clients in round {ours.round}")
    types = [(method, _types(run.folder)) for method, run in runs if method.forced is None]
    differ += [
        f"{method.label} and {types[0][0].label}: other LoRA types"
        for method, given in types[1:]
        if given != types[0][1]
    ]
    return {"seed": seed, "runs": len(runs), "same": not differ, "differences": differ}


def _data(run: Path) -> tuple[str, str]:
    """The fingerprints of data and model."""
    about = storage.read_json(run / RUN)
    return about["data"], about["model"]["fingerprint"]


def _types(run: Path) -> Any:
    return storage.read_json(run / FLEET)["clients"]
