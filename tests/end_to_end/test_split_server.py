"""The split server as a process: the same bytes as in this one, and what becomes of its deaths.

Clients are threads of this process, with models of their own blocks; sockets, TLS and the child
are real.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import write_tiny
from polyrank.errors import SplitServerError
from polyrank.model import LoadedModel, load_model
from polyrank.planning import CutPoint
from polyrank.protocol.packet import pack
from polyrank.split_server.interface import OpenRound, SplitServerHandle
from polyrank.split_server.process import SplitServerProcess
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training.job import Trained
from polyrank.training.split import SplitJob
from polyrank.transport.remote import Credentials, GrpcLink
from split_servers import (
    ATTEMPT,
    CUTS,
    LOWEST,
    NOTHING,
    ROUND,
    SPLIT,
    TOKENS,
    assert_identical,
    head_model,
    in_process,
    random_sums,
    server_jobs,
    split_job,
    train_all,
    train_one,
    whole,
)

SOON = 60.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    return write_tiny(folder, "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def model(source: Path) -> LoadedModel:
    return load_model(source, device="cpu")


def settings_of(source: Path, **changes: object) -> SplitServerSettings:
    made = SplitServerSettings(
        HostedModel(str(source), LOWEST, device="cpu"),
        run="run",
        split=SPLIT,
        deterministic=True,
        threads=torch.get_num_threads(),
        patience=4.0,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def server_process(source: Path) -> Iterator[SplitServerProcess]:
    with SplitServerProcess(settings_of(source), start=SOON, reply=SOON, restarts=1) as made:
        yield made


@pytest.fixture(autouse=True)
def _closed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server_process" in request.fixturenames:
        request.getfixturevalue("server_process").close()


def assert_gone(pid: int, seconds: float = 20.0) -> None:
    """Fail unless there is no such process soon; one that nobody has waited for counts as gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there after {seconds} s")


def opened(
    server_process: SplitServerHandle, model: LoadedModel, jobs: list[SplitJob], round: int = ROUND
) -> dict[str, Credentials]:
    """Open the server parts of jobs, all of which must get one."""
    server_parts = [replace(server_part, round=round) for server_part in server_jobs(model, jobs)]
    tokens = dict.fromkeys([one.job.client for one in jobs], TOKENS)
    merged = jobs[0].job.assignment.merged
    found = server_process.open(OpenRound(round, ATTEMPT, server_parts, merged, tokens, SOON))
    credentials = {client: one for client, one in found.items() if isinstance(one, Credentials)}
    assert credentials.keys() == tokens.keys(), found
    return credentials


def three(model: LoadedModel, **options: object) -> list[SplitJob]:
    return [
        split_job(model, client, cut, seed=i, count=7 + 2 * i, **options)
        for i, (client, cut) in enumerate(CUTS.items())
    ]


def trained_by(
    server_process: SplitServerHandle, source: Path, model: LoadedModel, jobs: list[SplitJob]
) -> None:
    """Train jobs against the split server, and fail unless it gives what `train_split` gives."""
    heads = train_all(source, jobs, opened(server_process, model, jobs))
    expected = in_process(model, jobs)
    for client, head in heads.items():
        server_part = server_process.collect(client)
        assert_identical(whole(head, server_part), expected[client])
        assert server_part.traffic.up == head.metrics["wire_up"]
        assert server_part.traffic.down == head.metrics["wire_down"]


def test_clients_of_several_cuts_at_once_learn_the_bytes_that_one_process_gives(
    server_process: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    trained_by(server_process, source, model, three(model))
    status = server_process.status()
    assert status.keys() == CUTS.keys()
    for one in status.values():
        assert one.step == one.steps > 1
        assert not one.connected
        assert min(one.up, one.down) > 0


def test_merged_sums_are_sent_once_and_change_no_byte(
    server_process: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    merged = random_sums(model)
    trained_by(server_process, source, model, three(model, merged=merged))
    server_process.close()
    trained_by(server_process, source, model, three(model))  # and it is taken out again


def test_a_client_that_leaves_has_no_update_and_the_others_go_on(
    server_process: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    jobs = three(model)
    credentials = opened(server_process, model, jobs)
    left = GrpcLink(credentials["a"])
    left.close()
    server_process.leave("u")
    with pytest.raises(SplitServerError, match="took 0 of"):
        server_process.collect("a")
    with pytest.raises(SplitServerError, match="given this client up"):
        server_process.collect("u")
    refused = train_one(head_model(source, jobs[2].cut), jobs[2], credentials["u"])
    assert refused.failure is not None
    assert "given this client up" in refused.failure
    head = train_one(head_model(source, jobs[1].cut), jobs[1], credentials["b"])
    expected = in_process(model, [jobs[1]])["b"]
    assert_identical(whole(head, server_process.collect("b")), expected)


def test_a_cut_below_the_blocks_that_are_held_is_a_reason_and_the_others_go_on(
    source: Path, model: LoadedModel, server_process: SplitServerProcess
) -> None:
    jobs = [split_job(model, "a", CutPoint(1)), split_job(model, "b", CutPoint(3))]
    server_parts = server_jobs(model, jobs)
    server_parts[0] = replace(
        server_parts[0], cut=CutPoint(2)
    )  # its assignment has more than the server runs
    found = server_process.open(
        OpenRound(ROUND, ATTEMPT, server_parts, NOTHING, dict.fromkeys("ab", TOKENS), SOON)
    )
    assert isinstance(found["a"], str)
    assert "no server part was made" in found["a"]
    assert isinstance(found["b"], Credentials)
    with pytest.raises(SplitServerError, match="no work open"):
        server_process.collect("a")
    with pytest.raises(SplitServerError, match="no work open"):
        server_process.collect("nobody")


def test_no_secret_and_no_path_is_in_the_command_line(server_process: SplitServerProcess) -> None:
    line = Path(f"/proc/{server_process.pid}/cmdline")
    if not line.exists():
        pytest.skip("reads Linux's /proc")
    assert line.read_bytes().split(b"\0")[1:] == [
        b"-P",
        b"-m",
        b"polyrank.split_server.worker",
        b"",
    ]


def training(
    source: Path, job: SplitJob, access: Credentials, at: int, act: Callable[[], object]
) -> tuple[Trained, float]:
    """Train a client, and act once it has taken so many steps; also the seconds after that."""
    steps, acted = 0, [0.0]

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            act()
            acted[0] = time.monotonic()

    found = train_one(head_model(source, job.cut), job, access, on_step=on_step)
    return found, time.monotonic() - acted[0]


def test_a_server_that_dies_is_noticed_by_all_and_started_again_but_not_for_ever(
    server_process: SplitServerProcess,
    source: Path,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = split_job(model, "a", CUTS["a"], count=15)
    old = opened(server_process, model, [job])["a"]
    killed = server_process.pid
    assert killed is not None
    os.kill(killed, signal.SIGINT)  # Ctrl-C is not for it
    head, seconds = training(source, job, old, 2, lambda: os.kill(killed, signal.SIGKILL))
    assert head.failure is not None
    assert seconds < 5 * old.patience  # it gave up; it did not wait for the round's end
    for _ in range(2):
        with pytest.raises(SplitServerError, match=r"is lost.*has died.*exit status is -9"):
            server_process.collect("a")
    assert not any(one.connected for one in server_process.status().values())
    server_process.leave("a")
    server_process.close()

    trained_by(
        server_process, source, model, [job]
    )  # by another, which takes no token of the first
    hanging = server_process.pid
    assert hanging not in (None, killed)
    assert train_one(head_model(source, job.cut), job, old).failure is not None

    os.kill(hanging or 0, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(server_process, "_reply_seconds", 0.3)
        with pytest.raises(SplitServerError, match="no answer in time"):
            server_process.collect("a")
    assert_gone(hanging or 0)
    assert server_process.pid is None
    found = server_process.open(
        OpenRound(ROUND, 2, server_jobs(model, [job]), NOTHING, {"a": TOKENS}, SOON)
    )
    assert isinstance(found["a"], str)
    assert f"was restarted 1 times in round {ROUND}" in found["a"]


def test_a_server_that_cannot_start_says_why(source: Path, model: LoadedModel) -> None:
    nowhere = replace(settings_of(source).model, source=str(source / "nowhere"))
    with SplitServerProcess(settings_of(source, model=nowhere), start=SOON) as server_process:
        with pytest.raises(SplitServerError, match=r"cannot start: .*nowhere is not one"):
            server_process.open(OpenRound(ROUND, ATTEMPT, [], NOTHING, {}, SOON))
        assert server_process.pid is None


PARENT = """
import subprocess, sys, time
from pathlib import Path
from polyrank.split_server.pipe import Pipe
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
child = subprocess.Popen([sys.executable, "-m", "polyrank.split_server.worker"], **pipes, bufsize=0)
pipe = Pipe(child.stdout.fileno(), child.stdin.fileno())
pipe.send(Path(sys.argv[1]).read_bytes())
pipe.receive(2**20)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_server_does_not_outlive_a_parent_that_is_killed(source: Path, tmp_path: Path) -> None:
    told = tmp_path / "settings"
    told.write_bytes(pack("settings", {"settings": settings_of(source).to_dict()}, {}))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(told)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
    assert_gone(child)
