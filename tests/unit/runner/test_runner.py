"""Resuming a run whose clients have the data: it names Flower, or shows what is finished."""

import io
import json

import pytest
from rich.console import Console

from polyrank import config
from polyrank.errors import RunError
from polyrank.report.progress import RunProgress
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import resume

RECIPE = """
rounds = 2
[model]
source = "sample"
[data]
source = "client"
[fleet]
types = { T1 = 4 }
clients = { a = "T1" }
[local]
lr = 1e-3
steps = 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first.toml").write_text(RECIPE)
    written = config.read(tmp_path / "first.toml").to_toml()
    (tmp_path / "recipe.toml").write_text(written)
    return tmp_path


def resumed(folder):
    return resume(folder, Invocation(RunProgress(Console(file=io.StringIO())), lambda: False))


def test_an_unfinished_run_names_flower_and_its_folder(folder):
    with pytest.raises(RunError) as raised:
        resumed(folder)
    assert "flwr run" in str(raised.value)
    assert f"app.resume = true and app.out = {str(folder)!r}" in str(raised.value)


def test_a_finished_run_is_shown(folder):
    summary = {"stopped": False, "rounds": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    outcome = resumed(folder)
    assert outcome.run.summary == summary
    assert outcome.run.finished_before
