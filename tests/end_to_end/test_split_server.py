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

from desks import (
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
    split_job,
    tails_of,
    train_all,
    train_one,
    whole,
)
from models import write_tiny
from polyrank.errors import SplitServerError
from polyrank.model import LoadedModel, load_model
from polyrank.planning import CutPoint
from polyrank.protocol.packet import pack
from polyrank.split_server.interface import SplitServerHandle
from polyrank.split_server.process import SplitServerProcess
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from polyrank.training.job import Trained
from polyrank.training.split import SplitJob
from polyrank.transport.remote import Credentials, GrpcLink

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
def desk(source: Path) -> Iterator[SplitServerProcess]:
    with SplitServerProcess(settings_of(source), start=SOON, reply=SOON, restarts=1) as made:
        yield made


@pytest.fixture(autouse=True)
def _closed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "desk" in request.fixturenames:
        request.getfixturevalue("desk").close()


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
    desk: SplitServerHandle, model: LoadedModel, jobs: list[SplitJob], round: int = ROUND
) -> dict[str, Credentials]:
    """Open the tails of jobs, all of which must get one."""
    tails = [replace(tail, round=round) for tail in tails_of(model, jobs)]
    tokens = dict.fromkeys([one.job.client for one in jobs], TOKENS)
    merged = jobs[0].job.assignment.merged
    found = desk.open(round, ATTEMPT, tails, merged, tokens, SOON)
    accesses = {client: one for client, one in found.items() if isinstance(one, Credentials)}
    assert accesses.keys() == tokens.keys(), found
    return accesses


def three(model: LoadedModel, **options: object) -> list[SplitJob]:
    return [
        split_job(model, client, cut, seed=i, count=7 + 2 * i, **options)
        for i, (client, cut) in enumerate(CUTS.items())
    ]


def trained_by(
    desk: SplitServerHandle, source: Path, model: LoadedModel, jobs: list[SplitJob]
) -> None:
    """Train jobs against the desk, and fail unless it gives what `train_split` gives."""
    heads = train_all(source, jobs, opened(desk, model, jobs))
    expected = in_process(model, jobs)
    for client, head in heads.items():
        tail = desk.collect(client)
        assert_identical(whole(head, tail), expected[client])
        assert tail.traffic.up == head.metrics["wire_up"]
        assert tail.traffic.down == head.metrics["wire_down"]


def test_clients_of_several_cuts_at_once_learn_the_bytes_that_one_process_gives(
    desk: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    trained_by(desk, source, model, three(model))
    status = desk.status()
    assert status.keys() == CUTS.keys()
    for one in status.values():
        assert one.step == one.steps > 1
        assert not one.connected
        assert min(one.up, one.down) > 0


def test_what_is_merged_into_the_base_is_given_once_and_changes_no_byte(
    desk: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    merged = random_sums(model)
    trained_by(desk, source, model, three(model, merged=merged))
    desk.close()
    trained_by(desk, source, model, three(model))  # and it is taken out again


def test_a_client_that_leaves_has_no_update_and_the_others_go_on(
    desk: SplitServerProcess, source: Path, model: LoadedModel
) -> None:
    jobs = three(model)
    accesses = opened(desk, model, jobs)
    left = GrpcLink(accesses["a"])
    left.close()
    desk.leave("u")
    with pytest.raises(SplitServerError, match="took 0 of"):
        desk.collect("a")
    with pytest.raises(SplitServerError, match="given this client up"):
        desk.collect("u")
    refused = train_one(head_model(source, jobs[2].cut), jobs[2], accesses["u"])
    assert refused.failure is not None
    assert "given this client up" in refused.failure
    head = train_one(head_model(source, jobs[1].cut), jobs[1], accesses["b"])
    expected = in_process(model, [jobs[1]])["b"]
    assert_identical(whole(head, desk.collect("b")), expected)


def test_a_cut_below_the_blocks_that_are_held_is_a_reason_and_the_others_go_on(
    source: Path, model: LoadedModel, desk: SplitServerProcess
) -> None:
    jobs = [split_job(model, "a", CutPoint(1)), split_job(model, "b", CutPoint(3))]
    tails = tails_of(model, jobs)
    tails[0] = replace(tails[0], cut=CutPoint(2))  # it was dealt more than the server runs
    found = desk.open(ROUND, ATTEMPT, tails, NOTHING, {"a": TOKENS, "b": TOKENS}, SOON)
    assert isinstance(found["a"], str)
    assert "no tail was made" in found["a"]
    assert isinstance(found["b"], Credentials)
    with pytest.raises(SplitServerError, match="no tail of it"):
        desk.collect("a")
    with pytest.raises(SplitServerError, match="no tail of it"):
        desk.collect("nobody")


def test_no_secret_and_no_path_is_in_the_command_line(desk: SplitServerProcess) -> None:
    line = Path(f"/proc/{desk.pid}/cmdline")
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
    desk: SplitServerProcess, source: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = split_job(model, "a", CUTS["a"], count=15)
    old = opened(desk, model, [job])["a"]
    killed = desk.pid
    assert killed is not None
    os.kill(killed, signal.SIGINT)  # Ctrl-C is not for it
    head, seconds = training(source, job, old, 2, lambda: os.kill(killed, signal.SIGKILL))
    assert head.failure is not None
    assert seconds < 5 * old.patience  # it gave up; it did not wait for the round's end
    for _ in range(2):
        with pytest.raises(SplitServerError, match=r"is lost.*has died.*exit status is -9"):
            desk.collect("a")
    assert not any(one.connected for one in desk.status().values())
    desk.leave("a")
    desk.close()

    trained_by(desk, source, model, [job])  # by another, which takes no token of the first
    hanging = desk.pid
    assert hanging not in (None, killed)
    assert train_one(head_model(source, job.cut), job, old).failure is not None

    os.kill(hanging or 0, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(desk, "_reply_in", 0.3)
        with pytest.raises(SplitServerError, match="no answer in time"):
            desk.collect("a")
    assert_gone(hanging or 0)
    assert desk.pid is None
    found = desk.open(ROUND, 2, tails_of(model, [job]), NOTHING, {"a": TOKENS}, SOON)
    assert isinstance(found["a"], str)
    assert f"was started 1 times more in round {ROUND}" in found["a"]


def test_a_server_that_cannot_start_says_why(source: Path, model: LoadedModel) -> None:
    nowhere = replace(settings_of(source).model, source=str(source / "nowhere"))
    with SplitServerProcess(settings_of(source, model=nowhere), start=SOON) as desk:
        with pytest.raises(SplitServerError, match=r"cannot start: .*nowhere is not one"):
            desk.open(ROUND, ATTEMPT, [], NOTHING, {}, SOON)
        assert desk.pid is None


PARENT = """
import subprocess, sys, time
from pathlib import Path
from polyrank.split_server.pipe import Control
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
child = subprocess.Popen([sys.executable, "-m", "polyrank.split_server.worker"], **pipes, bufsize=0)
control = Control(child.stdout.fileno(), child.stdin.fileno())
control.send(Path(sys.argv[1]).read_bytes())
control.receive(2**20)
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
