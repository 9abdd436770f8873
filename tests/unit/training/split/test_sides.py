"""Each end of split training needs the weights of its own blocks only."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from by_hand import assert_equal
from jobs import job
from models import tiny_loaded, write_tiny
from polyrank.algebra import Adapter, distance
from polyrank.errors import FrameError, ModelError
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import CutPoint
from polyrank.training import LocalTraining, train_cohort
from polyrank.training.split import (
    At,
    Heads,
    ServerPart,
    ServerParts,
    SplitJob,
    SplitSettings,
    Step,
    train_head,
    train_split,
)
from polyrank.transport import InProcessLinks, Limits, PipeLink, codec, serve_pipe

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
    with ServerParts(theirs, [one.at_server(theirs) for one in asked_for]) as tails:
        links = InProcessLinks(tails, "float64", whole.spec.hidden, 4096)
        for one, asked in zip(expected, asked_for, strict=True):
            steps: list[None] = []
            link = links.link(asked.job.client)
            other = train_head(
                mine,
                asked,
                link,
                SplitSettings(wire="float64"),
                on_step=lambda taken=steps: taken.append(None),
            )
            assert other.failure is None
            assert len(steps) == asked.job.steps
            with pytest.raises(FrameError, match="the link is closed"):
                link.submit(Step(At("a", 1, 0, 0), 1.0))
            parts = {**other.adapter, **tails.adapter(asked.job.client)}
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
        Heads(first, [asked.at_client(first)], [], SplitSettings())
    last = load_model(folder, device="cpu", spans=[Span(3)])
    with pytest.raises(ModelError, match=r"blocks \[2\] are needed, this model holds \[3\]"):
        ServerParts(last, [asked.at_server(last)])


@pytest.mark.parametrize("adapters", ["own", "shared"])
def test_clients_on_machines_of_their_own_train_what_they_do_in_one_process(adapters: str) -> None:
    """Three at once over pipes, each with a model of its own, as fast as each of them is.

    With a shared adapter the cuts differ, one client has more steps than the others, and each step
    waits for all who are at work.
    """

    def model() -> LoadedModel:
        return tiny_loaded("opt", num_hidden_layers=BLOCKS, dtype=torch.float64)

    here, at_server = model(), model()
    how = SplitSettings(wire="float64", adapters=adapters, in_flight=3)
    cuts = [CutPoint(1), CutPoint(2), CutPoint(1, 3)] if adapters == "shared" else [CutPoint(2)] * 3
    local = replace(LOCAL, batch=1, dropout=0.2)
    dealt = job(here, "a").assignment
    jobs = [
        replace(job(here, name, count=count, seed=count, local=local), assignment=dealt)
        for name, count in zip("abc", (3, 9, 5), strict=True)
    ]
    asked = [SplitJob(one, cut, 1) for one, cut in zip(jobs, cuts, strict=True)]

    def together(tail: ServerPart):
        return InProcessLinks(tail, "float64", here.spec.hidden, 4096).link

    expected = train_split(here, asked, how, together, cohort=8)
    limits = Limits(4096, here.spec.hidden, codec("float64"))
    pipes = {one.job.client: Pipe() for one in asked}
    tail_jobs = [one.at_server(at_server) for one in asked]
    with (
        ServerParts(at_server, tail_jobs, shared=adapters == "shared") as tails,
        ExitStack() as ends,
    ):
        theirs = {client: ends_of[1] for client, ends_of in pipes.items()}
        server = threading.Thread(target=serve_pipe, args=(tails, theirs, limits), daemon=True)
        server.start()
        clients = ends.enter_context(ThreadPoolExecutor(3))
        trained = [
            clients.submit(
                train_head,
                model(),
                one,
                PipeLink(pipes[one.job.client][0], one.job.client, limits),
                how,
            )
            for one in asked
        ]
        heads = [one.result(60) for one in trained]
        server.join(60)
        assert not server.is_alive()
        for one, head, whole in zip(asked, heads, expected, strict=True):
            assert (head.failure, whole.failure) == (None, None)
            assert_equal(
                Adapter({**head.adapter, **tails.adapter(one.job.client)}), whole.adapter, 1e-10
            )
            assert head.metrics == pytest.approx(whole.metrics, rel=1e-9)
