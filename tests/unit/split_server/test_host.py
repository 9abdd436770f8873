"""The server parts of a round on one model, over real sockets: grouped, merged once, separate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from by_hand import alone, model_of_three, requests_of, served, server_job
from grpc_rounds import Raw
from models import write_tiny
from polyrank.algebra import distance
from polyrank.errors import FrameError, RecipeError, SplitServerError
from polyrank.model import LoadedModel, load_model
from polyrank.planning import CutPoint
from polyrank.split_server.host import ServerPartHost
from polyrank.split_server.interface import OpenRound
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training.job import Trained
from polyrank.training.split import ServerParts, SplitJob, SplitSettings
from polyrank.transport import ServingSettings
from split_servers import (
    ATTEMPT,
    CUTS,
    LOWEST,
    ROUND,
    TOKENS,
    assert_identical,
    in_process,
    random_sums,
    server_jobs,
    split_job,
    train_all,
    whole,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def written(dtype: str) -> Path:
        if dtype not in found:
            folder = tmp_path_factory.mktemp("base") / dtype
            found[dtype] = write_tiny(
                folder, "llama", num_hidden_layers=4, dtype=getattr(torch, dtype)
            )
        return found[dtype]

    return written


@contextmanager
def hosting(
    source: Path, dtype: str, split: SplitSettings, **changes: object
) -> Iterator[ServerPartHost]:
    model = HostedModel(str(source), LOWEST, device="cpu", dtype=dtype)
    host = ServerPartHost(replace(SplitServerSettings(model, "run", split), **changes))
    try:
        yield host
    finally:
        host.stop()


def opened(host: ServerPartHost, model: LoadedModel, jobs: Sequence[SplitJob]) -> dict[str, object]:
    tokens = dict.fromkeys([one.job.client for one in jobs], TOKENS)
    merged = jobs[0].job.assignment.merged
    return host.open(OpenRound(ROUND, ATTEMPT, server_jobs(model, jobs), merged, tokens, 60.0))


def trained(
    source: Path, jobs: Sequence[SplitJob], dtype: str, split: SplitSettings, **changes: object
) -> dict[str, Trained]:
    """Return what clients at once and a host have trained together."""
    model = load_model(source, device="cpu", dtype=dtype)
    with hosting(source, dtype, split, **changes) as host:
        heads = train_all(source, jobs, opened(host, model, jobs), split, dtype)
        return {client: whole(head, host.collect(client)) for client, head in heads.items()}


def assert_close(found: Trained, expected: Trained, tolerance: float) -> None:
    assert found.adapter.keys() == expected.adapter.keys()
    for site, delta in found.adapter.items():
        other = expected.adapter[site]
        assert distance(delta, other) <= tolerance * max(1.0, other.norm()), site
    assert found.importance == pytest.approx(expected.importance, rel=tolerance)
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=tolerance)


@pytest.mark.parametrize("cuts", [CUTS, {"a": CutPoint(2), "b": CutPoint(2), "c": CutPoint(2)}])
def test_server_parts_whose_calls_interleave_train_as_if_each_were_alone(
    cuts: dict[str, CutPoint],
) -> None:
    """Between its calls no `ServerParts` acts on the model, also where it keeps graphs."""
    for checkpointing in (False, True):
        model = model_of_three(checkpointing=checkpointing)
        cuts = {
            client: CutPoint(1, 2) if cut.upper else CutPoint(min(cut.lower, 2))
            for client, cut in cuts.items()
        }
        jobs = [server_job(model, c, cut, seed=i) for i, (c, cut) in enumerate(cuts.items())]
        expected = {one.client: alone(model, one).hash() for one in jobs}
        with ExitStack() as stack:
            server_parts = {
                one.client: stack.enter_context(ServerParts(model, [one])) for one in jobs
            }
            left = {one.client: requests_of(model, one) for one in jobs}
            while any(left.values()):
                for client, requests in left.items():
                    if requests:
                        served(server_parts[client], requests.pop(0))
            found = {client: one.adapter(client).hash() for client, one in server_parts.items()}
        assert found == expected


@pytest.mark.parametrize(
    ("adapters", "dtype"), [("own", "float32"), ("own", "bfloat16"), ("shared", "float32")]
)
def test_sums_merged_once_for_all_server_parts_give_the_bits_of_train_split(
    base: Callable[[str], Path], dtype: str, adapters: str
) -> None:
    """On weights of the adapters' precision and on others, where M x is added and rounded once."""
    source, split = base(dtype), SplitSettings(wire="float32", adapters=adapters)
    model = load_model(source, device="cpu", dtype=dtype)
    merged = random_sums(model)
    clients = list(CUTS.items())[: 1 if adapters == "shared" else 3]
    jobs = [split_job(model, c, cut, seed=i, merged=merged) for i, (c, cut) in enumerate(clients)]
    found = trained(source, jobs, dtype, split, deterministic=True)
    expected = in_process(model, jobs, split)
    for client, one in found.items():
        assert_identical(one, expected[client])


def test_a_cohort_and_a_shared_adapter_give_what_one_process_gives_up_to_rounding(
    base: Callable[[str], Path],
) -> None:
    """Float64, where other orders of sums differ by 1e-13; a lost or doubled gradient by 1e-2."""
    source, dtype = base("float64"), "float64"
    model = load_model(source, device="cpu", dtype=dtype)
    own = SplitSettings(wire="float64")
    same = [split_job(model, c, CutPoint(2), seed=i, count=5 + i) for i, c in enumerate("abc")]
    found = trained(source, same, dtype, own, cohort=2, serving=ServingSettings(gather=5.0))
    for client, one in in_process(model, same, own).items():
        assert_close(found[client], one, 1e-9)

    shared = SplitSettings(wire="float64", adapters="shared")
    start = same[0].job.assignment
    merged = random_sums(model, dtype=torch.float64)
    unlike = [
        replace(one, cut=cut, job=replace(one.job, assignment=replace(start, merged=merged)))
        for one, cut in zip(same, CUTS.values(), strict=True)
    ]
    found = trained(source, unlike, dtype, shared, cohort=2, serving=ServingSettings(gather=0.05))
    for client, one in in_process(model, unlike, shared).items():
        assert_close(found[client], one, 1e-9)


def test_clients_of_one_adapter_that_take_turns_give_the_bits_of_one_process(
    base: Callable[[str], Path],
) -> None:
    source, split = base("float32"), SplitSettings(wire="float32", adapters="shared")
    model = load_model(source, device="cpu")
    same = [split_job(model, c, CutPoint(2), seed=i, count=5 + i) for i, c in enumerate("abc")]
    start = same[0].job.assignment
    unlike = [
        replace(one, cut=cut, job=replace(one.job, assignment=start))
        for one, cut in zip(same, CUTS.values(), strict=True)
    ]
    found = trained(source, unlike, "float32", split, deterministic=True)
    for client, one in in_process(model, unlike, split).items():
        assert_identical(found[client], one)


def test_clients_of_one_cut_are_grouped_in_their_order_and_a_bad_one_spoils_no_other(
    base: Callable[[str], Path],
) -> None:
    source = base("float32")
    model = load_model(source, device="cpu")
    names = ["e", "a", "d", "b", "c"]
    cuts = dict.fromkeys(names, CutPoint(2)) | {"b": CutPoint(3)}
    jobs = [split_job(model, name, cuts[name], seed=i) for i, name in enumerate(names)]
    server_parts = server_jobs(model, jobs)
    server_parts[2] = replace(
        server_parts[2], assignment=server_parts[3].assignment
    )  # d: of another cut's sites
    with hosting(source, "float32", SplitSettings(), cohort=3) as host:
        before = {name: p.data_ptr() for name, p in host._model.module.named_parameters()}
        merged = random_sums(model)
        tokens = dict.fromkeys(names, TOKENS)
        found = host.open(OpenRound(ROUND, ATTEMPT, server_parts, merged, tokens, 60.0))
        assert {name for name, one in found.items() if isinstance(one, str)} == {"d"}
        assert {group.clients for group in host._groups.values()} == {
            ("e",),
            ("a",),
            ("c",),
            ("b",),
        }
        good = [server_part for server_part in server_parts if server_part.client != "d"]
        host.open(OpenRound(ROUND, ATTEMPT, good, merged, tokens, 60.0))
        assert {group.clients for group in host._groups.values()} == {("e", "a", "c"), ("b",)}
        host.close()
        assert before == {name: p.data_ptr() for name, p in host._model.module.named_parameters()}
        assert host.status() == {}
        with pytest.raises(SplitServerError, match="no server part in this round"):
            host.collect("a")


def test_an_address_in_use_and_settings_that_cannot_be_are_refused(
    base: Callable[[str], Path],
) -> None:
    source = base("float32")
    with hosting(source, "float32", SplitSettings()) as host:
        with pytest.raises(FrameError, match="cannot listen on"):
            with hosting(source, "float32", SplitSettings(), listen=host.address):
                pass
    made = SplitServerSettings(HostedModel(str(source), 1), "run")
    with pytest.raises(RecipeError, match="cohort of 1"):
        replace(made, deterministic=True, cohort=2)
    with pytest.raises(RecipeError, match="patience"):
        replace(made, patience=-1.0)
    assert SplitServerSettings.from_dict(made.to_dict()) == made
    with pytest.raises(SplitServerError, match="not readable"):
        SplitServerSettings.from_dict({**made.to_dict(), "more": 1})
    assert replace(made, listen="[::1]:0").certified == ["::1"]
    assert replace(made, address="split.example:9000").certified == ["split.example"]


def test_a_client_may_have_as_many_frames_here_as_it_has_in_flight(
    base: Callable[[str], Path],
) -> None:
    """So much memory is held for a client, whatever it sends."""
    source = base("float32")
    model = load_model(source, device="cpu")
    split = SplitSettings(wire="float32", in_flight=3)
    with hosting(source, "float32", split) as host:
        access = opened(host, model, [split_job(model, "a", CUTS["a"])])["a"]
        with Raw(access) as raw:
            raw.send(hello=raw.hello())
            assert raw.received().welcome.credit == 3
