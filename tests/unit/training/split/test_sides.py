"""Each end of split training needs the weights of its own blocks only."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs import job
from models import write_tiny
from polyrank.algebra import distance
from polyrank.errors import FrameError, ModelError
from polyrank.model import Span, load_model
from polyrank.planning import CutPoint
from polyrank.training import LocalTraining, train_cohort
from polyrank.training.split import (
    ClientParts,
    RequestId,
    ServerParts,
    SplitJob,
    SplitSettings,
    Step,
    train_client_part,
)
from polyrank.transport import InProcessLinks

BLOCKS = 4
LOCAL = LocalTraining(epochs=2, batch=2, accumulation=2, lr=1e-2, clip=0.05)
SIDES: Mapping[CutPoint, tuple[list[Span], list[Span]]] = {
    CutPoint(1): ([Span(0, 1)], [Span(1)]),
    CutPoint(3): ([Span(0, 3)], [Span(3)]),
    CutPoint(1, 3): ([Span(0, 1), Span(3)], [Span(1, 3)]),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("cut", SIDES, ids=str)
def test_ends_that_hold_their_blocks_alone_train_what_the_whole_model_does(
    architecture: str, cut: CutPoint, tmp_path: Path
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
    asked_for = [SplitJob(one, cut, 1) for one in jobs]
    with ServerParts(theirs, [one.at_server(theirs) for one in asked_for]) as server_parts:
        links = InProcessLinks(server_parts, "float64", whole.spec.hidden, 4096)
        for one, asked in zip(expected, asked_for, strict=True):
            steps: list[None] = []
            link = links.link(asked.job.client)
            other = train_client_part(
                mine,
                asked,
                link,
                SplitSettings(wire="float64"),
                on_step=lambda taken=steps: taken.append(None),
            )
            assert other.failure is None
            assert len(steps) == asked.job.steps
            with pytest.raises(FrameError, match="the link is closed"):
                link.submit(Step(RequestId("a", 1, 0, 0), 1.0))
            parts = {**other.adapter, **server_parts.adapter(asked.job.client)}
            assert parts.keys() == one.adapter.keys()
            for site, delta in one.adapter.items():
                assert distance(delta, parts[site]) <= 1e-11 * max(1.0, delta.norm()), site


def test_an_end_refuses_to_begin_without_one_of_its_blocks(tmp_path: Path) -> None:
    """Before the first message: a server that finds out later takes its other clients with it."""
    folder = write_tiny(tmp_path, "llama", num_hidden_layers=BLOCKS)
    whole = load_model(folder, device="cpu")
    one, cut = job(whole, "a"), CutPoint(2)
    first = load_model(folder, device="cpu", spans=[Span(0, 1)])
    asked = SplitJob(one, cut, 1)
    with pytest.raises(ModelError, match=r"blocks \[1\] are needed, this model holds \[0\]"):
        ClientParts(first, [asked.at_client(first)], [], SplitSettings())
    last = load_model(folder, device="cpu", spans=[Span(3)])
    with pytest.raises(ModelError, match=r"blocks \[2\] are needed, this model holds \[3\]"):
        ServerParts(last, [asked.at_server(last)])
