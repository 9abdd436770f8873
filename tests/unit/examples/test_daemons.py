"""Processes that tests and the demo start: all are found again and stopped, whatever they do."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from daemons import Daemons

SLEEPS = "import time; time.sleep(600)"
DETACHES = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], start_new_session=True)
"""
STAYS = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
{SLEEPS}
"""


def wait_until(true, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_child_that_has_detached_itself_and_lost_its_parent_is_stopped(tmp_path: Path) -> None:
    with Daemons(tmp_path) as daemons:
        parent = daemons.start("parent", [sys.executable, "-c", DETACHES], tmp_path)
        parent.process.wait()
        wait_until(daemons.all)
        (orphan,) = daemons.all()
        assert orphan.pid != parent.pid
    assert not psutil.pid_exists(orphan.pid) or orphan.status() == psutil.STATUS_ZOMBIE
    assert daemons.all() == []


def test_what_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemons.SECONDS_TO_END", 0.3)
    with Daemons(tmp_path) as daemons:
        stubborn = daemons.start("stubborn", [sys.executable, "-c", STAYS], tmp_path)
        wait_until(lambda: "up" in stubborn.printed())
    assert stubborn.process.returncode == -signal.SIGKILL


def test_a_failure_inside_stops_all_the_same(tmp_path: Path) -> None:
    started = []

    def fails() -> None:
        with Daemons(tmp_path) as daemons:
            started.append(daemons.start("one", [sys.executable, "-c", SLEEPS], tmp_path))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not started[0].running


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEPS])
    try:
        with Daemons(tmp_path / "a") as daemons, Daemons(tmp_path / "b") as more:
            mine = daemons.start("mine", [sys.executable, "-c", SLEEPS], tmp_path)
            wait_until(daemons.all)
            assert [process.pid for process in daemons.all()] == [mine.pid]
            more.stop()
            assert mine.running
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


NESTED = f"""
import sys
from pathlib import Path
from daemons import Daemons
inner = Daemons(Path("inner"))
inner.start("inner", [sys.executable, "-c", {SLEEPS!r}], Path())
print("up", flush=True)
{SLEEPS}
"""


def test_what_a_killed_harness_has_started_is_found_by_the_one_around_it(tmp_path: Path) -> None:
    folder = Path(sys.modules["daemons"].__file__ or "").parent
    with Daemons(tmp_path, {"PYTHONPATH": str(folder)}) as outer:
        killed = outer.start("nested", [sys.executable, "-c", NESTED], tmp_path)
        wait_until(lambda: "up" in killed.printed())
        killed.process.kill()
        killed.process.wait()
        wait_until(lambda: len(outer.all()) == 1)
    assert outer.all() == []
