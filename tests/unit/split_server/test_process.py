"""The handle of a process that misbehaves; the processes here are scripts without torch."""

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyrank.algebra import Adapter
from polyrank.errors import SplitServerError
from polyrank.protocol.packet import pack
from polyrank.split_server import subprocess_handle as handle
from polyrank.split_server.interface import OpenRound
from polyrank.split_server.process import SplitServerProcess
from polyrank.split_server.settings import HostedModel, SplitServerSettings

SETTINGS = SplitServerSettings(HostedModel("nowhere", 1), "run")
NONE: Adapter = Adapter({})
COMMON = """
import os, signal, sys, time
def take():
    length = int.from_bytes(sys.stdin.buffer.read(8), "little")
    return sys.stdin.buffer.read(length)
def give(name):
    block = open(os.path.join(sys.argv[1], name), "rb").read()
    sys.stdout.buffer.write(len(block).to_bytes(8, "little") + block)
    sys.stdout.buffer.flush()
"""
Made = Callable[..., SplitServerProcess]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives the handle of a script, which can `take()` and `give(NAME)`."""
    blocks = {
        "ready": pack("ready", {"address": "127.0.0.1:1"}, {}),
        "opened": pack("opened", {"clients": {}}, {}),
        "strange": pack("opened", {"clients": {"a": {"address": "nowhere"}}}, {}),
        "failed": pack("failed", {"reason": "it has no room"}, {}),
        "garbage": b"\x80\x04N.",
    }
    for name, block in blocks.items():
        (tmp_path / name).write_bytes(block)
    handles = []

    def make(script: str, **options: float) -> SplitServerProcess:
        command = [sys.executable, "-c", COMMON + script, str(tmp_path)]
        monkeypatch.setattr(handle, "COMMAND", command)
        handles.append(SplitServerProcess(SETTINGS, **{"start": 30.0, "reply": 30.0, **options}))
        return handles[-1]

    yield make
    monkeypatch.setattr(handle, "SECONDS_TO_STOP", 0.2)
    for one in handles:
        one.stop()


def opened(server: SplitServerProcess, round: int = 1):
    return server.open(OpenRound(round, 0, [], NONE, {}, 60.0))


def assert_gone(pid: int | None) -> None:
    assert pid is not None
    with pytest.raises(ProcessLookupError):  # it was waited for, too
        os.kill(pid, 0)


SERVING = "take(); give('ready'); take(); give('opened');"


@pytest.mark.parametrize(
    "after",
    [
        "sys.stdin.read()",  # it ends with its input
        "time.sleep(600)",  # it is asked to
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); give('opened'); time.sleep(600)",
    ],
)
def test_stopping_leaves_no_process(
    made: Made, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr(handle, "SECONDS_TO_STOP", 0.3)
    server = made(SERVING + after)
    assert server.pid is None
    assert opened(server) == {}
    assert server.address == "127.0.0.1:1"
    pid = server.pid
    server.stop()
    assert_gone(pid)
    assert server.pid is None
    server.stop()
    server.close()
    server.leave("a")
    assert server.status() == {}
    with pytest.raises(SplitServerError, match="no work open"):
        server.collect("a")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("take(); give('failed')", "cannot start: it has no room"),
        ("take(); give('garbage')", "cannot start: ready packet"),
        ("take(); give('opened')", "cannot start: ready packet.*expected one of ready"),
        ("take(); sys.stdout.buffer.write(b'\\xff' * 8); sys.stdout.flush()", "at most 67108864"),
        ("take(); sys.stdout.buffer.write(b'\\x09' + b'\\0' * 9); sys.stdout.flush()", "after 2"),
        ("take(); sys.exit(3)", "exit status is 3"),
        ("os.close(0); os.close(1); time.sleep(600)", "closed"),
    ],
)
def test_a_process_that_cannot_start_is_an_error_and_leaves_nothing(
    made: Made, script: str, message: str
) -> None:
    server = made(script)
    with pytest.raises(SplitServerError, match=f"(?s){message}"):
        opened(server)
    assert server.pid is None
    assert server._child is not None
    assert_gone(server._child.process.pid)


def test_its_last_lines_are_told(made: Made) -> None:
    server = made("[print(f'line {i}', file=sys.stderr) for i in range(30)]; sys.exit(3)")
    with pytest.raises(SplitServerError) as caught:
        opened(server)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [f"line {i}" for i in range(10, 30)]
    assert "exit status is 3" in lines[0]


def test_a_process_that_takes_too_long_is_killed(made: Made) -> None:
    server = made("time.sleep(600)", start=0.3)
    with pytest.raises(SplitServerError, match="no answer in time"):
        opened(server)
    assert server._child is not None
    assert_gone(server._child.process.pid)


def test_a_process_that_had_worked_is_restarted_a_bounded_number_of_times(
    made: Made, tmp_path: Path
) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x');"
    server = made(count + "take(); give('ready'); take()", restarts=2)
    assert opened(server) == {}  # nobody asks, and nobody gets an answer
    assert len((tmp_path / "count").read_text()) == 3
    assert opened(server) == {}
    assert len((tmp_path / "count").read_text()) == 3
    assert opened(server, round=2) == {}
    assert len((tmp_path / "count").read_text()) == 5


def test_a_failure_of_a_question_is_no_death(made: Made) -> None:
    server = made("take(); give('ready'); take(); give('failed'); take(); give('opened'); take()")
    assert opened(server) == {}
    pid = server.pid
    assert pid is not None
    assert opened(server) == {}
    assert server.pid == pid


def test_death_is_seen_without_asking(made: Made) -> None:
    server = made(SERVING + "sys.exit(5)")
    opened(server)
    end = time.monotonic() + 30
    while server.pid is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert server.pid is None


@pytest.mark.parametrize(
    ("listen", "address", "names"),
    [
        ("127.0.0.1:0", None, ["127.0.0.1"]),
        ("[::1]:0", None, ["::1"]),
        ("0.0.0.0:9099", "server.example", ["server.example"]),
        ("0.0.0.0:9099", "server.example:443", ["server.example"]),
        ("0.0.0.0:9099", "[2001:db8::1]:443", ["2001:db8::1"]),
        ("0.0.0.0:9099", "2001:db8::1", ["2001:db8::1"]),
    ],
)
def test_the_certificate_is_for_the_host_that_clients_dial(listen, address, names):
    settings = SplitServerSettings(HostedModel("model", 1), "run", listen=listen, address=address)
    assert settings.certified == names


def test_a_busy_process_ends_when_its_parent_is_killed_though_its_input_stays_open() -> None:
    """Nothing closes its input here: that its parent is gone is all there is to see."""
    busy = (
        "import os, threading, time, polyrank.split_server.worker as tails\n"
        "parent = int(os.environ['PARENT'])\n"
        "threading.Thread(target=tails._watch_parent, args=(parent,), daemon=True).start()\n"
        "print(os.getppid() == parent, flush=True)\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end: pass"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "os.environ['PARENT'] = str(os.getpid())\n"
        f"subprocess.Popen([sys.executable, '-c', {busy!r}])\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        process.kill()
        with selectors.DefaultSelector() as selector:  # its output ends when it does
            selector.register(process.stdout, selectors.EVENT_READ)
            assert selector.select(30.0)
        assert process.stdout.read() == b""
