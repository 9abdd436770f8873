"""`make deploy-demo` from outside: it ends with an adapter, and leaves nothing when interrupted."""

import signal
import sys
import time
from pathlib import Path

import pytest

from daemons import Daemon, Daemons

DEMO = Path(__file__).parents[2] / "examples" / "deploy" / "demo.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def started(daemons: Daemons, folder: Path) -> Daemon:
    """Start the demo with a folder of its own for what is temporary."""
    temporary = folder / "temporary"
    temporary.mkdir()
    daemons.environment["TMPDIR"] = str(temporary)
    command = [sys.executable, "-u", DEMO, "--out", folder / "run"]
    return daemons.start("demo", command, folder)


def test_the_demo_ends_with_an_adapter_and_a_line_for_each_client(tmp_path: Path) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        demo = started(daemons, tmp_path)
        assert demo.process.wait(800) == 0, demo.printed()
    printed = demo.printed()
    assert "Flower says finished:completed" in printed
    assert "peft loads it: PeftModelForCausalLM, rank 16" in printed
    end = printed.partition("from summary.json")[2]
    for client in ("hospital-a", "hospital-b", "clinic-c"):
        assert f"  {client:<12}{3:>15}" in end
    assert list((tmp_path / "temporary").glob("polyrank-demo-*")) == []
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_ctrl_c_leaves_no_process_and_no_key(tmp_path: Path) -> None:
    with Daemons(tmp_path / "logs") as daemons:
        demo = started(daemons, tmp_path)
        until = time.monotonic() + 300
        while "ranks by type" not in demo.printed():
            assert demo.running, demo.printed()
            assert time.monotonic() < until, demo.printed()
            time.sleep(0.2)
        below = daemons.below(demo.pid)
        assert len(below) > 8  # SuperLink, SuperNodes, what each of them starts, and apps
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(60) == 130, demo.printed()
        assert "nothing is left running" in demo.printed()
        assert [process for process in below if process.is_running() and not zombie(process)] == []
    assert list((tmp_path / "temporary").glob("polyrank-demo-*")) == []


def zombie(process) -> bool:
    return process.status() == "zombie"
