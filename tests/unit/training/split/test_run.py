"""A split client trains what it would have trained whole, whichever block it is cut at."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from jobs import job
from models import tiny_loaded
from polyrank.aggregation.types import Penalty
from polyrank.algebra import Adapter, Dense, LowRank, Sparse, distance
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint
from polyrank.training import Job, LocalTraining, Trained, train_cohort
from polyrank.training.split import ServerPart, SplitJob, SplitSettings, train_split
from polyrank.transport import InProcessLinks

BLOCKS = 4
EXACT = SplitSettings(wire="float64")
CUTS = (CutPoint(1), CutPoint(2), CutPoint(3), CutPoint(1, 2), CutPoint(1, 3), CutPoint(2, 3))
LOCAL = LocalTraining(epochs=2, batch=2, accumulation=2, lr=1e-2, clip=0.05, weight_decay=0.1)


def deep(architecture: str = "llama", **options: object) -> LoadedModel:
    return tiny_loaded(architecture, num_hidden_layers=BLOCKS, dtype=torch.float64, **options)


def connect(
    model: LoadedModel, wire: str = "float64"
) -> Callable[[ServerPart], Callable[[str], object]]:
    return lambda server_part: InProcessLinks(server_part, wire, model.spec.hidden, 4096).link


def split(
    model: LoadedModel,
    jobs: Sequence[Job],
    cuts: CutPoint | Sequence[CutPoint],
    settings: SplitSettings = EXACT,
    cohort: int = 8,
) -> list[Trained]:
    each = [cuts] * len(jobs) if isinstance(cuts, CutPoint) else cuts
    asked = [SplitJob(one, cut, 1) for one, cut in zip(jobs, each, strict=True)]
    return train_split(model, asked, settings, connect(model, settings.wire), cohort=cohort)


def assert_same(one: Trained, other: Trained, tolerance: float = 1e-11) -> None:
    assert (one.failure, other.failure) == (None, None)
    assert one.adapter.keys() == other.adapter.keys()
    for site, delta in one.adapter.items():
        assert distance(delta, other.adapter[site]) <= tolerance * max(1.0, delta.norm()), site
    for name in ("loss", "first_loss", "last_loss", "tokens", "target_tokens", "grad_norm"):
        assert one.metrics[name] == pytest.approx(other.metrics[name], rel=1e-10), name


def fleet(model: LoadedModel, local: LocalTraining = LOCAL) -> list[Job]:
    """Three clients of unequal ranks, amounts of data and scales, one with a frozen term."""
    return [
        job(model, "a", ranks=1, count=9, seed=1, local=local),
        job(model, "b", ranks=3, count=5, seed=2, scale=0.5, local=local, frozen=2),
        job(model, "c", ranks=4, count=7, seed=3, local=local),
    ]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_split_clients_end_with_the_adapter_of_whole_ones(cut: CutPoint) -> None:
    model = deep()
    whole = train_cohort(model, fleet(model))
    for one, other in zip(whole, split(model, fleet(model), cut), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3", "phi3", "opt"])
@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 3)], ids=str)
def test_other_architectures_too(architecture: str, cut: CutPoint) -> None:
    model = deep(architecture)
    whole = train_cohort(model, fleet(model))
    for one, other in zip(whole, split(model, fleet(model), cut), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("cut", [CutPoint(2), CutPoint(1, 3)], ids=str)
@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_checkpointing_and_microbatches_in_flight_change_nothing(
    cut: CutPoint, in_flight: int, checkpointing: bool
) -> None:
    local = replace(LOCAL, dropout=0.3, accumulation=4, batch=1)
    whole = train_cohort(deep(), fleet(deep(), local))
    model = deep(checkpointing=checkpointing)
    settings = replace(EXACT, in_flight=in_flight)
    for one, other in zip(whole, split(model, fleet(model, local), cut, settings), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    "local",
    [
        replace(LOCAL, optimizer="sgd", momentum=0.9, lr=0.1),
        replace(LOCAL, proximal=0.5),
        replace(LOCAL, clip=0, warmup=0.4, schedule="linear"),
    ],
    ids=["sgd", "proximal", "schedule"],
)
def test_every_way_of_training_goes_across_the_cut(local: LocalTraining) -> None:
    model = deep()
    whole = train_cohort(model, fleet(model, local))
    for one, other in zip(whole, split(model, fleet(model, local), CutPoint(2)), strict=True):
        assert_same(one, other)


def test_a_fixed_a_and_a_penalty_go_across_the_cut() -> None:
    model = deep()
    jobs = fleet(model)
    keep = dict.fromkeys(jobs[2].assignment.start, 1)
    jobs[1] = replace(jobs[1], assignment=replace(jobs[1].assignment, train="b"))
    jobs[2] = replace(jobs[2], assignment=replace(jobs[2].assignment, penalty=Penalty(0.3, keep)))
    for one, other in zip(train_cohort(model, jobs), split(model, jobs, CutPoint(2)), strict=True):
        assert_same(one, other)
    fixed, start = split(model, jobs, CutPoint(2))[1].adapter, jobs[1].assignment.start
    assert all(torch.equal(fixed[site].a, start[site].a) for site in start)


def test_merged_sums_and_sparse_starts_go_across_the_cut() -> None:
    model = deep()
    draw = torch.Generator().manual_seed(0)

    def matrix(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=draw, dtype=torch.float64) / 10

    merged = Adapter({s: Dense(matrix(*shape)) for s, shape in model.spec.shapes.items()})
    factors = [replace(j, assignment=replace(j.assignment, merged=merged)) for j in fleet(model)]
    sparse = Adapter(
        {
            s: Sparse(matrix(1, 3)[0], torch.tensor([0, 5, 7]), shape)
            for s, shape in model.spec.shapes.items()
        }
    )
    values = [replace(j, assignment=replace(j.assignment, start=sparse)) for j in factors]
    values[1] = replace(values[1], assignment=replace(values[1].assignment, frozen=Adapter({})))
    for jobs in (factors, values):
        for cut in (CutPoint(1), CutPoint(1, 3)):
            whole = train_cohort(model, jobs)
            for one, other in zip(whole, split(model, jobs, cut), strict=True):
                assert_same(one, other)


def test_merged_sums_make_a_difference() -> None:
    """The comparison above would not see a merged sum that both paths leave out."""
    model = deep()
    merged = Adapter(
        {s: Dense(torch.ones(shape, dtype=torch.float64)) for s, shape in model.spec.shapes.items()}
    )
    plain = job(model, "a")
    changed = replace(plain, assignment=replace(plain.assignment, merged=merged))
    losses = [split(model, [one], CutPoint(2))[0].metrics["first_loss"] for one in (plain, changed)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_smaller_cohort_gives_the_same() -> None:
    model = deep()
    jobs = fleet(model)
    alone = [split(model, [one], CutPoint(2))[0] for one in jobs]
    for one, other in zip(alone, split(model, jobs, CutPoint(2)), strict=True):
        assert_same(one, other)


def test_factors_of_both_sides_have_moved() -> None:
    model = deep()
    one = job(model, "a", local=LOCAL)
    (trained,) = split(model, [one], CutPoint(2))
    for site, delta in trained.adapter.items():
        assert isinstance(delta, LowRank)
        assert distance(delta, one.assignment.start[site]) > 1e-6, site
