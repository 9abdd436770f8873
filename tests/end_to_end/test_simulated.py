"""A recipe on Flower's simulation: the very bytes of the run in one process."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs polyrank[flower]")

from rich.console import Console

from flower_simulation import simulate
from polyrank import config
from polyrank.flower.app_folder import write_app
from polyrank.report.progress import RunProgress
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import start
from watched_deployment import CLIENTS, adapter, client_toml, recipe_of, write_base

RECIPE = """
name = "simulated"
seed = 2
rounds = 2
[model]
source = "sample"
[data]
source = "sample"
[fleet]
types = "scaled"
distribution = "uniform"
cuts = { T1 = 1, T2 = [1, 3] }
[split]
wire = "float32"
[local]
lr = 3e-3
steps = 2
[sampling]
number = 5
[evaluation]
every = 2
examples = 2
generate = 0
[engine]
threads = 1
deterministic = true
"""


def test_a_simulated_run_gives_the_bytes_of_one_process_whole_and_split_clients_alike(
    tmp_path: Path,
) -> None:
    file, app = tmp_path / "recipe.toml", tmp_path / "app"
    file.write_text(RECIPE, encoding="utf-8")
    recipe = config.read(file)
    write_app(recipe, app)
    here, away = tmp_path / "here", tmp_path / "away"
    with RunProgress(Console(quiet=True)) as terminal:
        start(recipe, here, Invocation(terminal, lambda: False))

    status, log = simulate(tmp_path / "flower", app, 3, {"app": {"out": str(away), "wait": 120}})

    assert status.completed, f"{status}\n{log}"
    name = "adapter/adapter_model.safetensors"
    assert (away / name).read_bytes() == (here / name).read_bytes()
    ours, theirs = (
        [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        for run in (here, away)
    )
    kept = ("round", "clients", "loss", "bytes_up", "bytes_down", "wire_up", "wire_down", "cuts")
    assert [[one[key] for key in kept] for one in theirs] == [
        [one[key] for key in kept] for one in ours
    ]
    assert {cut for one in theirs for cut in one["cuts"]} >= {"1", "1–3", "whole"}
    assert "asked 5 clients" in log, "progress is in flwr log"


def test_clients_with_their_own_data_are_simulated_from_their_client_files(tmp_path: Path) -> None:
    """The very bytes of a run on all their data; without the files nothing is begun."""
    write_base(tmp_path)
    for client in CLIENTS:
        client_toml(tmp_path, client)
    few = {"rounds": 1, "local": {"steps": 4}}
    app, out, here = tmp_path / "app", tmp_path / "out", tmp_path / "here"
    write_app(recipe_of(tmp_path, apart=True, **few), app)

    status, log = simulate(tmp_path / "refused", app, 3, {"app": {"out": str(out)}})
    assert not status.completed
    assert "a simulated machine has no data of its own" in log
    assert not out.exists()

    files = str(tmp_path / "[abc].toml")
    own = {"app": {"out": str(out), "wait": 120, "client-files": files}}
    status, log = simulate(tmp_path / "flower", app, 3, own)
    assert status.completed, f"{status}\n{log}"
    with RunProgress(Console(quiet=True)) as terminal:
        start(recipe_of(tmp_path, apart=False, **few), here, Invocation(terminal, lambda: False))
    assert adapter(out) == adapter(here)
