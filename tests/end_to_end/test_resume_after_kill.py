"""A run that is killed and resumed ends with the bytes of one that never was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = 30


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the driver tells of its killed runs; see there."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, str(Path(__file__).with_name("kill_driver.py"))]
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [*driver, str(root), str(MOMENTS), "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_killed_run_ends_with_the_same_bytes(report):
    assert len(report["runs"]) == MOMENTS
    for one in report["runs"]:
        assert one["ended"][0] == "SIGKILL", one
        assert one["ended"][-1] == "exit 0", one
        assert one["differing"] == [], one


def test_the_kills_hit_the_writing_of_checkpoints_and_updates(report):
    places = [one["moment"] for one in report["runs"]]
    for place in ("checkpoints/", "updates/", "half of", "from outside"):
        assert sum(place in moment for moment in places) >= 5, places
    assert sum(len(one["ended"]) == 3 for one in report["runs"]) >= 10, "killed twice"


def test_the_run_compared_is_a_whole_one(report):
    expected = {"adapter/adapter_model.safetensors", "rounds.jsonl", "summary.json", "base.json"}
    assert expected <= set(report["files"])
    assert any(name.startswith("checkpoints/round-00004/") for name in report["files"])
    assert not any("partial" in name for name in report["files"])


def test_nothing_is_left_beside_the_folders(report):
    assert report["beside"] == []
