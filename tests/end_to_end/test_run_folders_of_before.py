"""Run folders of version 0.1 resume, export and are inspected (tests/fixtures/run_folder_0_1)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyrank.cli import main
from polyrank.run import environment

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_folder_0_1"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the fixture that stands where its files say."""
    copy = tmp_path / "before"
    shutil.copytree(FIXTURE, copy)
    for path in copy.rglob("*"):
        if path.suffix in {".json", ".toml", ".md"} and "@FOLDER@" in path.read_text("utf-8"):
            path.write_text(path.read_text("utf-8").replace("@FOLDER@", str(copy)), "utf-8")
    return copy


def command(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_run_that_was_stopped_goes_on_to_what_it_would_have_become(folder: Path) -> None:
    stopped, finished = folder / "stopped", folder / "finished"

    assert command("resume", stopped, "--allow-inexact") == 0

    written = json.loads((stopped / "run.json").read_text("utf-8"))
    begun = json.loads((finished / "run.json").read_text("utf-8"))
    if not environment.differences(begun, written):  # The machine that wrote it, or its like.
        assert (stopped / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    got, expected = load_file(stopped / ADAPTER), load_file(finished / ADAPTER)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-4, rtol=1e-3)
    ours, theirs = (
        [json.loads(line) for line in (run / "rounds.jsonl").read_text("utf-8").splitlines()]
        for run in (stopped, finished)
    )
    for key in ("round", "clients", "bytes_up", "bytes_down", "cuts"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key


@pytest.mark.parametrize("run", ["stopped", "finished"])
def test_an_old_run_is_inspected(folder: Path, run: str, capsys: pytest.CaptureFixture) -> None:
    assert command("inspect", folder / run) == 0
    assert "weak" in capsys.readouterr().out


def test_the_adapter_of_an_old_run_is_exported(folder: Path, tmp_path: Path) -> None:
    assert command("export", folder / "finished", tmp_path / "small", "--rank", "2") == 0
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


def test_a_rank_above_the_run_s_own_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("export", folder / "finished", tmp_path / "large", "--rank", "400") == 0
    told = capsys.readouterr().out
    assert "rank 400 was asked for; the run's largest is 4: written as it is" in told
    assert "rank 4 keeps 100.000% of the energy" in told


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("option", ["--sites", "--json"])
def test_an_output_that_is_not_utf_8_gets_what_it_can_hold(
    folder: Path, encoding: str, option: str
) -> None:
    words = [sys.executable, "-m", "polyrank", "inspect", str(folder / "finished"), option]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(encoding)
    shown = done.stdout.decode(encoding)
    if option == "--json":
        json.loads(shown)
    else:
        assert "weak" in shown
