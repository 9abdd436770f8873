"""Each end of split training needs the weights of its own blocks only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import job
from models import write_tiny
from polyrank.algebra import distance
from polyrank.errors import ModelError
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import Split
from polyrank.training import Job, LocalTraining, train_cohort
from polyrank.training.split import Heads, SplitJob, SplitSettings, TailJob, Tails
from polyrank.transport import InProcessLinks

BLOCKS = 4
LOCAL = LocalTraining(epochs=2, batch=2, accumulation=2, lr=1e-2, clip=0.05)
SIDES: Mapping[Split, tuple[list[Span], list[Span]]] = {
    Split(1): ([Span(0, 1)], [Span(1)]),
    Split(3): ([Span(0, 3)], [Span(3)]),
    Split(1, 3): ([Span(0, 1), Span(3)], [Span(1, 3)]),
}


def own(one: Job, model: LoadedModel) -> Job:
    """Return a job of the sites that a model holds."""
    return replace(one, assignment=one.assignment.only(set(model.spec.shapes)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("cut", SIDES, ids=str)
def test_ends_that_hold_their_blocks_alone_train_what_the_whole_model_does(
    architecture: str, cut: Split, tmp_path: Path
) -> None:
    changes = {"n_layer": BLOCKS} if architecture == "gpt2" else {"num_hidden_layers": BLOCKS}
    if architecture == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    folder = write_tiny(tmp_path, architecture, **changes)
    whole = load_model(folder, device="cpu", dtype="float64")
    jobs = [
        job(whole, "a", ranks=1, count=9, seed=1, local=LOCAL, frozen=2),
        job(whole, "b", ranks=3, count=5, seed=2, local=LOCAL),
    ]
    expected = train_cohort(whole, jobs)

    mine, theirs = (
        load_model(folder, device="cpu", dtype="float64", spans=spans) for spans in SIDES[cut]
    )
    assert (mine.hosted | theirs.hosted, mine.hosted & theirs.hosted) == (set(range(BLOCKS)), set())
    tail_jobs = []
    for one in jobs:
        part = own(one, theirs)
        tail_jobs.append(
            TailJob(one.client, 1, 0, cut, part.assignment, LOCAL, one.seed, one.steps)
        )
    with Tails(theirs, tail_jobs) as tails:
        links = InProcessLinks(tails, "float64", whole.spec.hidden, 4096)
        with Heads(
            mine,
            [SplitJob(own(one, mine), cut, 1) for one in jobs],
            [links.link(one.client) for one in jobs],
            SplitSettings(wire="float64"),
        ) as heads:
            for step in range(heads.steps):
                heads.gradients(step)
                heads.submit_step(step)
                heads.complete(step)
            trained = heads.results()
        for one, other, asked in zip(expected, trained, jobs, strict=True):
            assert other.failure is None
            parts = {**other.adapter, **tails.adapter(asked.client)}
            assert parts.keys() == one.adapter.keys()
            for site, delta in one.adapter.items():
                assert distance(delta, parts[site]) <= 1e-11 * max(1.0, delta.norm()), site


def test_an_end_refuses_to_begin_without_one_of_its_blocks(tmp_path: Path) -> None:
    """Before the first message: a server that finds out later takes its other clients with it."""
    folder = write_tiny(tmp_path, "llama", num_hidden_layers=BLOCKS)
    whole = load_model(folder, device="cpu")
    one, cut = job(whole, "a"), Split(2)
    first = load_model(folder, device="cpu", spans=[Span(0, 1)])
    part = own(one, first)
    with pytest.raises(ModelError, match=r"blocks \[1\] are needed, this model holds \[0\]"):
        Heads(first, [SplitJob(part, cut, 1)], [], SplitSettings())
    last = load_model(folder, device="cpu", spans=[Span(3)])
    tail_job = TailJob("a", 1, 0, cut, own(one, last).assignment, one.local, one.seed, one.steps)
    with pytest.raises(ModelError, match=r"blocks \[2\] are needed, this model holds \[3\]"):
        Tails(last, [tail_job])
