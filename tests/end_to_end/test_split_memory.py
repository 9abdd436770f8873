"""A client in a process of its own trains a model that is larger than its memory.

The processes are those of benchmarks/split_memory.py.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "split_memory.py"
    spec = importlib.util.spec_from_file_location("split_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def check(found: Mapping[str, Any], apart: float) -> None:
    """What holds for every size."""
    client, server, whole = (found[role] for role in ("client", "server", "whole"))
    assert client.weights + server.weights == whole.weights
    # What a client is spared: nearly all that the server's weights take.
    assert whole.peak - client.peak > 0.9 * server.weights
    assert client.metrics["steps"] == whole.metrics["steps"] > 1
    assert client.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    # The float32 wire loses nothing. What remains is float32 rounding in other orders of addition,
    # 3e-6 as measured, which AdamW enlarges where a gradient is near zero.
    assert apart < 1e-4


@pytest.mark.slow
def test_a_client_is_spared_the_server_s_weights_and_learns_the_same(
    bench: ModuleType, tmp_path: Path
) -> None:
    plan = bench.Plan(layers=8, hidden=512, vocabulary=4096, cut=1, steps=2, length=16, timeout=300)
    found, apart = bench.measure(tmp_path, plan)
    assert found["whole"].weights > 100 * 2**20
    check(found, apart)


@pytest.mark.slow
def test_a_client_stays_below_a_budget_below_the_whole_model(
    bench: ModuleType, tmp_path: Path
) -> None:
    plan = bench.Plan()
    found, apart = bench.measure(tmp_path, plan)
    budget = 0.7 * found["whole"].weights
    assert found["whole"].weights > 1000 * 2**20
    # Resident in all, the interpreter and its libraries included.
    assert found["client"].peak < budget < found["whole"].weights < found["whole"].peak
    check(found, apart)


def test_no_process_outlives_a_failure(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", start)
    plan = replace(bench.QUICK, timeout=0)
    with pytest.raises(RuntimeError, match="stopped"):
        bench.run(tmp_path, plan, ["client", "server"])
    assert len(started) == 2
    for one in started:
        assert one.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(one.pid, 0)
