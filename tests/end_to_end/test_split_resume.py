"""A split run that is ended early, and resumed, ends with the same bytes."""

import hashlib
import json
from pathlib import Path

import pytest

import federations
from kill_driver import ROUNDS, content, setting
from kill_runs import driven
from polyrank.errors import InterruptedRunError

SETTINGS = ("own", "shared")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("how", "moments"),
    [
        ("steps", 2),
        pytest.param("steps", 8, marks=pytest.mark.slow),
        pytest.param("kill", 8, marks=pytest.mark.slow),
    ],
)
def test_every_killed_split_run_ends_with_the_same_bytes(tmp_path, name, how, moments):
    report = driven(how, moments, tmp_path, name)
    assert len(report["runs"]) == moments
    for one in report["runs"]:
        assert one["ended"][0] == "SIGKILL", one
        assert one["ended"][-1] == "exit 0", one
        assert one["differing"] == [], one
        assert how == "kill" or one["moment"] == "step"
    assert {"adapter/adapter_model.safetensors", "rounds.jsonl"} <= set(report["files"])
    assert report["beside"] == []


def ended_at(folder: Path, name: str, every: int | None) -> int:
    """Carry a run out, stopping at every so many questions whether to; return how often it was."""
    stops = 0
    while True:
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == every

        try:
            with federations.opened(
                folder, **setting(name), resume=folder.exists(), stop=stop
            ) as run:
                list(run.rounds(ROUNDS))
                run.finish()
                return stops
        except InterruptedRunError:
            stops += 1


@pytest.mark.parametrize("name", SETTINGS)
def test_a_split_run_that_is_stopped_again_and_again_ends_with_the_same_bytes(tmp_path, name):
    """Each time after some more steps than the longest cohort takes, so that it gets on."""
    assert ended_at(tmp_path / "whole", name, None) == 0
    assert ended_at(tmp_path / "stopped", name, 15) > 3
    one, other = content(tmp_path / "whole"), content(tmp_path / "stopped")
    assert one.keys() == other.keys()
    assert [file for file in one if one[file] != other[file]] == []


def test_own_and_shared_adapters_are_two_things(tmp_path):
    """The runs above would not end alike if the setting were not heeded."""
    found = set()
    for name in SETTINGS:
        ended_at(tmp_path / name, name, None)
        adapter = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        found.add(hashlib.sha256(adapter).hexdigest())
        lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
        assert {cut for line in lines for cut in json.loads(line)["cuts"]} == {"1", "1–2", "whole"}
    assert len(found) == 2
