"""Importance by explicit weight gradients, a slow oracle; and jobs that are scored.

    products = dense_products(model, one)      # W·G per site, of the first step of a Job

The oracle gives every adapted W a gradient of its own; the scores are Σ_k |Σ_j W_kj G_kj| and
|Σ W·G| of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jobs import job
from models import PAD, tiny_loaded
from polyrank.model import Cohort, LoadedModel, Part, logits_at
from polyrank.planning import CutPoint
from polyrank.training import (
    Job,
    LocalTraining,
    Scoring,
    Trained,
    train_cohort,
)
from polyrank.training.batches import assemble, step_groups
from polyrank.training.local import merged_of, slot_of
from polyrank.training.split import ServerPart, SplitJob, SplitSettings, train_split
from polyrank.transport import InProcessLinks

BLOCKS = 4
EVERY = Scoring(1)
LOCAL = LocalTraining(epochs=None, steps=1, batch=2, accumulation=2, lr=1e-2, clip=0.05)
SHARED = 1e-6
"""Norms compute in float32 even here, and a shared set divides by the tokens after them."""
METRICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "channel": lambda products: products.sum(1).abs().sum(),
    "paper": lambda products: products.sum().abs(),
}


def first_groups(one: Job) -> list[list]:
    """The rows of the job's first step, by microbatch."""
    group = next(iter(step_groups(len(one.examples), one.local, one.seed)))
    return [[one.examples[i] for i in micro] for micro in group]


def dense_products(model: LoadedModel, one: Job) -> dict[str, Tensor]:
    """W·G per site, m×n, of the first step's mean loss; no code of polyrank's cohorts runs."""
    weights = {}
    for site in one.assignment.start:
        child = model.module.get_submodule(site)
        weight = child.weight.T if isinstance(child, Conv1D) else child.weight
        if site in one.assignment.merged:
            weight = weight + one.assignment.merged[site].matrix.to(weight)
        weights[site] = weight.detach().clone().requires_grad_()
    micros = first_groups(one)
    targets = sum(row.targets for rows in micros for row in rows)
    for rows in micros:
        changed = {}
        for site, weight in weights.items():
            total = weight + one.assignment.start[site].dense()
            if site in one.assignment.frozen:
                total = total + one.assignment.frozen[site].dense()
            child = model.module.get_submodule(site)
            changed[f"{site}.weight"] = total.T if isinstance(child, Conv1D) else total
        longest = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), longest), PAD)
        labels = torch.full((len(rows), longest), -100)
        for i, row in enumerate(rows):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[i, row.loss_from : len(row.input_ids)] = ids[
                i, row.loss_from : len(row.input_ids)
            ]
        logits = torch.func.functional_call(model.module, changed, (ids,)).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum"
        )
        (loss / targets).backward()
    return {site: (w * w.grad).detach() for site, w in weights.items()}


def cohort_products(model: LoadedModel, one: Job) -> dict[str, Tensor]:
    """W·G per site of the first step, in float64, with the job's hooks and dropout around W."""
    slot = slot_of(one.assignment, one.local, one.seed)
    micros = first_groups(one)
    targets = sum(row.targets for rows in micros for row in rows)
    with Cohort(model, [slot], merged_of([one])) as cohort:
        weights = {site: model.module.get_submodule(site).weight for site in one.assignment.start}
        for weight in weights.values():
            weight.requires_grad_()
        for micro, rows in enumerate(micros):
            longest = max(len(row.input_ids) for row in rows)
            cohort.route([Part(0, len(rows), longest, (0, micro))])
            batch = assemble(rows, PAD, model.device)
            logits = logits_at(model, batch.input_ids, batch.positions)
            exact = torch.float64 if model.dtype == torch.float64 else torch.float32
            loss = nn.functional.cross_entropy(logits.to(exact), batch.targets, reduction="sum")
            (loss / targets).backward()
        found = {}
        for site, weight in weights.items():
            both = weight.detach().double(), weight.grad.double()
            weight.requires_grad_(False)
            weight.grad = None
            if isinstance(model.module.get_submodule(site), Conv1D):
                both = both[0].T, both[1].T
            if site in one.assignment.merged and model.dtype == torch.bfloat16:
                both = both[0] + one.assignment.merged[site].matrix.double(), both[1]
            found[site] = both[0] * both[1]
        return found


def assert_scores(
    got: Mapping[str, float], products: Mapping[str, Tensor], metric: str, tolerance: float
) -> None:
    """Each score is off by at most `tolerance` of Σ|W·G| at its site."""
    assert got.keys() == products.keys()
    for site, product in products.items():
        bound = tolerance * float(product.abs().sum())
        assert abs(got[site] - float(METRICS[metric](product))) <= bound, site


def scores(model: LoadedModel, one: Job, metric: str = "channel") -> Mapping[str, float]:
    (found,) = train_cohort(model, [replace(one, scoring=Scoring(1, metric))])
    assert found.failure is None
    return found.importance


def f64(architecture: str = "llama", **options: object) -> LoadedModel:
    return tiny_loaded(architecture, dtype=torch.float64, **options)


def deep(architecture: str = "llama", **options: object) -> LoadedModel:
    return f64(architecture, num_hidden_layers=BLOCKS, **options)


def split(
    model: LoadedModel,
    jobs: Sequence[Job],
    cuts: CutPoint | Sequence[CutPoint],
    cohort: int = 8,
    **settings: object,
) -> list[Trained]:
    each = [cuts] * len(jobs) if isinstance(cuts, CutPoint) else cuts
    asked = [SplitJob(one, cut, 1) for one, cut in zip(jobs, each, strict=True)]

    def connect(tail: ServerPart) -> Callable[[str], object]:
        return InProcessLinks(tail, "float64", model.spec.hidden, 4096).link

    exact = SplitSettings(wire="float64", **settings)
    return train_split(model, asked, exact, connect, cohort=cohort)


def fleet(model: LoadedModel, scoring: Scoring = EVERY, **changes: object) -> list[Job]:
    """Three clients of unequal ranks, amounts of data, scales and steps, one with a frozen term."""
    local = replace(LOCAL, epochs=1, steps=None, **changes)
    made = [
        job(model, "a", ranks=1, count=9, seed=1, local=local),
        job(model, "b", ranks=3, count=5, seed=2, scale=0.5, local=local, frozen=2),
        job(model, "c", ranks=4, count=7, seed=3, local=local),
    ]
    return [replace(one, scoring=scoring) for one in made]


def lowest_untouched(model: LoadedModel, below: int, rank: int = 2) -> dict[str, int]:
    """Ranks of 0 in the blocks below, as for sites that a client leaves alone."""
    return {site.name: rank if site.block >= below else 0 for site in model.spec.sites}


def same(one: Mapping[str, float], other: Mapping[str, float], tolerance: float = 1e-9) -> None:
    """Each score differs by at most `tolerance` of the largest."""
    assert one
    assert one.keys() == other.keys()
    for site, score in one.items():
        assert abs(score - other[site]) <= tolerance * max(other.values()), site
