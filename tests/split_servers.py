"""Split clients against a split server: each on a thread, with a model of its own blocks.

trained = train_all(source, jobs, accesses, SPLIT)   # what each client learned, by name
expected = in_process(model, jobs, SPLIT)            # train_split, one client after the other
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from jobs import job
from polyrank.algebra import Adapter, Dense
from polyrank.model import LoadedModel, Span, load_model
from polyrank.planning import CutPoint
from polyrank.split_server.interface import ServerPartResult
from polyrank.training import LocalTraining, Scoring
from polyrank.training.job import Trained
from polyrank.training.split import (
    Link,
    ServerPart,
    ServerPartJob,
    SplitJob,
    SplitSettings,
    train_client_part,
    train_split,
)
from polyrank.transport import InProcessLinks
from polyrank.transport.remote import Credentials, GrpcLink

BLOCKS, LOWEST, TOKENS, ROUND, ATTEMPT = 4, 1, 24, 3, 1
LOCAL = LocalTraining(lr=0.02, batch=2, accumulation=2, epochs=1, dropout=0.1, clip=0.5)
SPLIT = SplitSettings(wire="float32")
CUTS: Mapping[str, CutPoint] = {"a": CutPoint(1), "b": CutPoint(3), "u": CutPoint(1, 3)}
NOTHING: Adapter[Dense] = Adapter({})


def split_job(
    model: LoadedModel,
    client: str,
    cut: CutPoint,
    *,
    seed: int = 0,
    count: int = 9,
    local: LocalTraining = LOCAL,
    merged: Adapter[Dense] = NOTHING,
) -> SplitJob:
    """Return a client's work, scored in every other step."""
    made = job(model, client, seed=seed, count=count, local=local)
    assigned = replace(made.assignment, merged=merged)
    scored = replace(made, assignment=assigned, scoring=Scoring(2))
    return SplitJob(scored, cut, ROUND, ATTEMPT)


def server_jobs(model: LoadedModel, jobs: Sequence[SplitJob]) -> list[ServerPartJob]:
    """Return the jobs as the split server gets them: of its sites, without what is merged."""
    found = []
    for one in jobs:
        server_part = one.at_server(model)
        found.append(
            replace(server_part, assignment=replace(server_part.assignment, merged=NOTHING))
        )
    return found


def random_sums(model: LoadedModel, *, dtype: torch.dtype = torch.float32) -> Adapter[Dense]:
    """Return a dense update at every site, large enough that leaving it out would show."""
    draw = torch.Generator().manual_seed(9)
    return Adapter(
        {
            site: Dense(0.2 * torch.randn(*shape, generator=draw, dtype=dtype))
            for site, shape in model.spec.shapes.items()
        }
    )


def head_model(source: Path, cut: CutPoint, dtype: str = "float32") -> LoadedModel:
    """Return a model that holds a client's own blocks alone."""
    own = [Span(0, cut.lower)] + ([] if cut.upper is None else [Span(cut.upper)])
    return load_model(source, device="cpu", dtype=dtype, spans=own)


def train_one(
    model: LoadedModel,
    one: SplitJob,
    access: Credentials | str,
    split: SplitSettings = SPLIT,
    on_step: Callable[[], None] | None = None,
) -> Trained:
    """Train a client on a model of its own blocks; it reaches its server part through a socket."""
    assert isinstance(access, Credentials), access
    mine = one.with_assignment(one.job.assignment.only(model.spec.shapes))
    return train_client_part(model, mine, GrpcLink(access), split, on_step=on_step)


def train_all(
    source: Path,
    jobs: Sequence[SplitJob],
    credentials: Mapping[str, Credentials | str],
    split: SplitSettings = SPLIT,
    dtype: str = "float32",
) -> dict[str, Trained]:
    """Train all clients at once, each on a thread."""
    # Loaded before anyone trains: transformers changes torch's default dtype while it loads.
    models = [head_model(source, one.cut, dtype) for one in jobs]

    def train(model: LoadedModel, one: SplitJob) -> Trained:
        return train_one(model, one, credentials[one.job.client], split)

    with ThreadPoolExecutor(len(jobs)) as pool:
        names = [one.job.client for one in jobs]
        return dict(zip(names, pool.map(train, models, jobs), strict=True))


def in_process(
    model: LoadedModel, jobs: Sequence[SplitJob], split: SplitSettings = SPLIT
) -> dict[str, Trained]:
    """Return what `train_split` gives: one by one, or together where they share an adapter."""

    def connect(server_part: ServerPart) -> Callable[[str], Link]:
        return InProcessLinks(server_part, split.wire, model.spec.hidden, TOKENS).link

    groups = [list(jobs)] if split.adapters == "shared" else [[one] for one in jobs]
    found = {}
    for group in groups:
        trained = train_split(model, group, split, connect, cohort=1)
        found |= zip([one.job.client for one in group], trained, strict=True)
    return found


def whole(head: Trained, part: ServerPartResult) -> Trained:
    """Return what a client and its server have trained, together."""
    assert head.failure is None, head.failure
    assert not head.adapter.keys() & part.adapter.keys()
    return replace(
        head,
        adapter=Adapter({**head.adapter, **part.adapter}),
        importance={**head.importance, **part.importance},
    )


def assert_identical(found: Trained, expected: Trained) -> None:
    """Fail unless adapters, scores and numbers are the same bit by bit."""
    assert found.adapter.keys() == expected.adapter.keys()
    assert found.adapter.hash() == expected.adapter.hash()
    assert found.importance == expected.importance
    assert found.metrics == expected.metrics
