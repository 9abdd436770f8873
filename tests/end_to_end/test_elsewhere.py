"""Federations whose clients are elsewhere give what one process gives; gRPC is real, on loopback.

What passes is bytes: messages channel server and clients, frames channel the ends of a split model,
of which each end has its own blocks alone.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cut_fleets import BLOCKS, SPLIT_DATA, SPLIT_FLEET, TYPES, WHO
from federations import MEASURED, QUIET, SITES, clients, fleet, one_block, opened
from memory_channel import MemoryChannel
from models import write_tiny
from polyrank.aggregation import RULES, FlexLoRA, FLoRA, SLoRA
from polyrank.model import load_model
from polyrank.planning import LoRAType
from polyrank.run import RunSettings
from polyrank.split_server.host import ServerPartHost
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training.split import SplitSettings
from remote_federations import OnDisk, channel_to_each, machines, remote_federation, train_requests
from rules import named


@pytest.mark.parametrize("rule", [*RULES.values(), SLoRA(FlexLoRA(), 2)], ids=named)
def test_three_rounds_elsewhere_are_those_of_one_process(rule):
    """Client by client the very same bits; in passes of three the order of sums differs."""
    model, run_settings = one_block(torch.float64), RunSettings(evaluation=MEASURED, cohort=1)
    types = fleet(clients(), equal=not rule.mixed_ranks)
    common = {"model": model, "rule": rule, "settings": run_settings, "fleet": types}
    with opened(**common) as here:
        ours, our_result = list(here.rounds(3)), here.finish()
        expected = here.adapter.factors
    with remote_federation(channel_to_each(model=model), **common) as there:
        theirs, their_result = list(there.rounds(3)), there.finish()
        found = there.adapter.factors
    assert found.hash() == expected.hash()
    same = ("loss", "clients", "bytes_up", "bytes_down", "traffic", "rejected", "ranks", "tokens")
    for one, other in zip(ours, theirs, strict=True):
        assert {n: getattr(one, n) for n in same} == {n: getattr(other, n) for n in same}
        close(one.evaluation, other.evaluation)
    for part in ("base", "final"):
        close(our_result[part], their_result[part])
    assert our_result["clients"] == their_result["clients"]

    together = RunSettings(evaluation=QUIET, cohort=3)
    with opened(model=model, rule=rule, settings=together, fleet=types) as here:
        list(here.rounds(3))
        for site, delta in here.adapter.factors.items():
            torch.testing.assert_close(found[site].dense(), delta.dense(), rtol=1e-8, atol=1e-8)


def close(one, other):
    """Fail unless JSON is the same but for the last digits of float64 sums in other batches."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    else:
        assert one == other


# --- split clients ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=BLOCKS)


EVEN = replace(SPLIT_FLEET, types={name: LoRAType(name, {"all": 2}) for name in TYPES})
"""One adapter that clients share has one rank."""


@contextmanager
def split_server_of(folder: Path, split: SplitSettings) -> Iterator[ServerPartHost]:
    """The split server, its tails on a thread of this process and its port open."""
    hosted = HostedModel(str(folder), 1, device="cpu", sites=[*SITES])
    host = ServerPartHost(SplitServerSettings(hosted, "run", split, deterministic=True, threads=1))
    try:
        yield host
    finally:
        host.stop()


@pytest.mark.parametrize(
    ("rule", "adapters", "fleet"),
    [
        pytest.param(FlexLoRA(), "own", SPLIT_FLEET, id="flexlora"),
        pytest.param(FLoRA(), "own", SPLIT_FLEET, id="flora"),
        pytest.param(FlexLoRA(), "shared", EVEN, id="one adapter for all at the server"),
    ],
)
def test_split_clients_elsewhere_give_the_bytes_of_one_process(folder, rule, adapters, fleet):
    """Of several cuts, a U-shape, and types with nothing to train on one side of the cut.

    Clients that share one adapter at the server take turns there, as they do in one process.
    """
    split = SplitSettings(wire="float32", adapters=adapters)
    run_settings = RunSettings(evaluation=QUIET, cohort=1, split=split)
    model = load_model(str(folder), device="cpu", sites=[*SITES])
    common = {"model": model, "rule": rule, "settings": run_settings, "fleet": fleet}
    with opened(data=SPLIT_DATA, **common) as here:
        ours = list(here.rounds(2))
        expected = here.adapter.factors
    hosts = machines(SPLIT_DATA, model=OnDisk(folder, [*SITES]), split=split)
    channel = MemoryChannel(hosts, together=len(SPLIT_DATA))
    with (
        split_server_of(folder, split) as split_server,
        remote_federation(channel, split_server=split_server, **common) as there,
    ):
        theirs = list(there.rounds(2))
        found = there.adapter.factors
    for one, other in zip(ours, theirs, strict=True):
        assert other.rejected == {}
        assert one.loss == other.loss
        assert one.cuts == other.cuts
        assert (one.wire_up, one.wire_down) == (other.wire_up, other.wire_down)
        assert one.traffic == other.traffic
        assert other.wire_up > 0
    assert found.hash() == expected.hash()
    second = [request.task for request in train_requests(channel)[len(WHO) :]]
    assert {task.round for task in second} == {2}
    assert all(bool(task.assignment.merged) == isinstance(rule, FLoRA) for task in second)
