"""The recipes on what users would bring: the kit's tasks and model, and the miniature."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

from kit import kit_path
from runs import adapter_bytes, polyrank, process

# The whole recipe takes minutes; this is the same on fewer clients, steps and examples.
SMALL = ("rounds=2", "sampling.number=3", "local.steps=2", "data.limit=10")
SCORED = ("evaluation.every=0", "evaluation.examples=1", "evaluation.generate=0")


@pytest.mark.kit
def test_natural_instructions_learns_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    kit_path("natural_instructions", "tasks.jsonl.gz")
    run = ("run", "natural-instructions", *SMALL, *SCORED, "--out")
    done = polyrank(*run, tmp_path / "whole")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for who, clients in (("seen", 107), ("unseen", 18)):
        assert summary["final"][who]["clients"] == clients
        assert summary["final"][who]["loss"] < summary["base"][who]["loss"] - 1.0

    killed = process(tmp_path, *run, tmp_path / "killed")
    try:
        first = tmp_path / "killed" / "checkpoints" / "round-00001"
        wait_for(first, killed)
    finally:
        killed.kill()
        killed.communicate()
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = polyrank("resume", tmp_path / "killed")
    assert resumed.code == 0, resumed.err
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Return once the path is there; fail if the process ends or two minutes pass before."""
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_quickstart_teaches_training_and_held_out_clients(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("rounds=3", "control=", "evaluation.every=0", "evaluation.generate=1")
    done = polyrank("run", "quickstart", *settings, "--out", out)
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    for who in ("seen", "unseen"):
        assert summary["final"][who]["loss"] < summary["base"][who]["loss"] - 3.0
    assert len(adapter_bytes(out)) > 0
    assert AutoPeftModelForCausalLM.from_pretrained(out / "adapter").peft_config


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 4])
def test_the_quickstart_shows_that_unequal_ranks_beat_the_weakest_type(
    seed: int, tmp_path: Path
) -> None:
    """As a newcomer sees it, and with the control at a rate that suits rank 1."""
    out = tmp_path / "run"
    done = polyrank("run", "quickstart", f"seed={seed}", "--out", out)
    assert done.code == 0, done.err
    own_rate = ("control=", "fleet.force=weakest", "local.lr=1e-2")
    done_too = polyrank("run", "quickstart", f"seed={seed}", *own_rate, "--out", tmp_path / "own")
    assert done_too.code == 0, done_too.err
    summary = json.loads((out / "summary.json").read_text())
    for control in (out / "control", tmp_path / "own"):
        beside = json.loads((control / "summary.json").read_text())
        for who in ("seen", "unseen"):
            for score, better in (("exact_match", 1), ("rouge_l", 1), ("loss", -1)):
                gained = summary["final"][who][score] - beside["final"][who][score]
                assert better * gained > 0.05, (control, who, score)
    assert "In short: answers that match exactly went from 0% to" in done.out
    assert "with every client at the weakest type" in done.out
    assert done.out.count("Name the") + done.out.count("Give only") == 3
