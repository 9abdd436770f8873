"""The server of a run whose clients are elsewhere: its folder, what it refuses, going on."""

import io
import json

import pytest
from rich.console import Console

from memory_channel import MemoryChannel, NoReply
from polyrank.aggregation import State
from polyrank.config.app import APP_KEYS, app_settings
from polyrank.config.flower import from_run_config, to_run_config
from polyrank.config.reading import checked
from polyrank.errors import (
    FolderExistsError,
    FolderInUseError,
    RecipeError,
    RoundFailedError,
    RunError,
)
from polyrank.remote.hosting import client_node
from polyrank.remote.server import check, folder_of, recipe_to_resume, serve, wait_for
from polyrank.report.progress import RunProgress
from polyrank.run import Checkpoint, RunFolder
from polyrank.run.folder import RUN
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import start
from remote_federations import train_requests

CONTENT = {
    "name": "tiny",
    "seed": 1,
    "rounds": 2,
    "model": {"source": "sample"},
    "data": {"source": "sample"},
    "fleet": {"distribution": "uniform", "types": "scaled"},
    "local": {"steps": 1},
    "sampling": {"number": 3},
    "evaluation": {"every": 0, "examples": 1, "generate": 0},
    "engine": {"threads": 1, "deterministic": True},
}
RESUMED = {"app.resume": True}


def run_config(out, **changes):
    config = {**APP_KEYS, **to_run_config(checked({**CONTENT, **changes}, "recipe"))}
    return {**config, "app.out": str(out)}


def served(config, trouble=None):
    parts = {n: client_node(config, {"partition-id": n, "num-partitions": 3}) for n in range(3)}
    channel = MemoryChannel(parts, trouble)
    return channel, lambda: serve(from_run_config(config), app_settings(config), channel, "run")


def here(folder):
    """Carry the same recipe out in this process."""
    quiet = RunProgress(Console(file=io.StringIO()))
    return start(checked(CONTENT, "recipe"), folder, Invocation(quiet, lambda: False)).folder


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_over_messages_is_the_run_of_one_process_and_goes_on_after_a_failure(
    tmp_path, capsys
):
    """Its second round fails, then a new server goes on in the same folder."""
    expected = adapter(here(tmp_path / "here"))
    config = run_config(tmp_path / "away")

    def second(message, payload):
        if message.kind == "train" and len(train_requests(channel)) > 3:
            return NoReply("\x1b[31mcable cut\nhere")
        return payload

    channel, run = served(config, second)
    with pytest.raises(RoundFailedError, match="round 2: fewer than 50%"):
        run()
    told = capsys.readouterr().err
    assert "cable cut here" in told
    assert "\x1b[31mcable" not in told, "what others wrote does not steer the terminal"
    assert "asked 3 clients" in told

    again, run = served(config | RESUMED)
    outcome = run()
    assert outcome.folder == tmp_path / "away"
    assert adapter(outcome.folder) == expected
    assert len(train_requests(again)) == 3, "of the second round alone"
    assert len((outcome.folder / "rounds.jsonl").read_text().splitlines()) == 2

    recipe = outcome.folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("rounds = 2", "rounds = 3"))
    longer, run = served(run_config(outcome.folder, rounds=3) | RESUMED)
    assert run().run.summary["rounds"] == 3, "a finished run is made longer"
    assert len(train_requests(longer)) == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the recipe that has ended."""
    return here(tmp_path_factory.mktemp("finished") / "run")


def test_a_finished_run_that_is_resumed_is_shown_as_one_of_before(finished, capsys):
    channel, run = served(run_config(finished) | RESUMED)
    outcome = run()
    assert outcome.run.summary == json.loads((finished / "summary.json").read_text())
    assert outcome.run.finished_before
    assert "finished before, nothing was trained" in capsys.readouterr().out.replace("\n", " ")
    assert outcome.run.finished_before
    assert channel.sent == [], "nobody is asked for what is finished"


def test_a_new_run_never_takes_a_folder_that_exists(finished, tmp_path):
    (tmp_path / "notes").mkdir()
    for folder in (finished, tmp_path / "notes"):
        channel, run = served(run_config(folder, rounds=1))
        with pytest.raises(FolderExistsError, match=r"app\.out: .* exists already.*app\.resume"):
            run()
        assert channel.sent == []


def test_without_a_folder_a_new_run_takes_the_next_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, settings = from_run_config(run_config("")), app_settings(run_config(""))
    assert folder_of(recipe, settings) == tmp_path / "runs" / "tiny"
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-2").symlink_to("nowhere")
    assert folder_of(recipe, settings) == tmp_path / "runs" / "tiny-3"


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in ("notes", "nothing"):
        _, run = served(run_config(tmp_path / name) | RESUMED)
        with pytest.raises(RunError, match=name):
            run()


def test_settings_that_differ_from_those_of_the_run_are_refused_with_both_values(finished):
    """Of a finished run too, which would otherwise pass for one with the new settings."""
    changed = {"rounds": 8, "local": {"steps": 1, "lr": 0.5}, "sampling": {}}
    channel, run = served(run_config(finished, **changed) | RESUMED)
    with pytest.raises(RecipeError) as caught:
        run()
    told = str(caught.value)
    assert f"the run in {finished} was begun with other settings" in told
    assert "rounds: 2 there, 8 here" in told
    assert "sampling.number: 3 there, left out here" in told
    assert "local.lr: " in told
    assert "there, 0.5 here" in told
    assert "local.steps" not in told, "it is the same"
    assert channel.sent == []


def test_threads_that_are_not_given_are_those_of_the_run_and_the_model_may_have_moved(finished):
    changed = {"engine": {"deterministic": True}, "model": {"source": "elsewhere"}}
    asked = checked({**CONTENT, **changed}, "recipe")
    found = recipe_to_resume(asked, finished)
    assert (found.engine.threads, found.model.source) == (1, "elsewhere")
    asked = checked({**CONTENT, "engine": {"deterministic": True, "threads": 2}}, "recipe")
    with pytest.raises(RecipeError, match=r"engine\.threads: 1 there, 2 here"):
        recipe_to_resume(asked, finished)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"source": "sample", "pooled": True}}, r"data\.pooled"),
        ({"control": "weakest"}, "control: a run over Flower has none"),
    ],
)
def test_what_needs_all_data_in_one_process_is_refused(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        check(checked({**CONTENT, **changes}, "recipe"), app_settings({}), simulated=False)


def test_a_simulation_of_clients_with_their_own_data_needs_their_files():
    recipe = checked({**CONTENT, "data": {"source": "client"}}, "recipe")
    check(recipe, app_settings({}), simulated=False)
    check(recipe, app_settings({"app.client-files": "/data/*.toml"}), simulated=True)
    with pytest.raises(RecipeError, match=r"data\.source = 'client': .*app\.client-files"):
        check(recipe, app_settings({}), simulated=True)


def test_too_few_clients_is_an_error_that_says_who_is_there(tmp_path):
    config = run_config(tmp_path / "few") | {"app.clients": 40, "app.wait": 0.1}
    _, run = served(config)
    with pytest.raises(RecipeError, match=r"app\.wait: .* of 40 clients are there"):
        run()
    assert not (tmp_path / "few").exists()


def test_a_plan_that_measures_how_often_to_score_has_what_it_measures_with(tmp_path):
    """Scoring is timed on the model's weights, which the server has no other need of."""
    changes = {
        "devices": {"big": {"memory": "2 GiB"}},
        "fleet": {"distribution": {"big": 1.0}},
        "plan": {"cuts": "none"},
        "rounds": 1,
    }
    _, run = served(run_config(tmp_path / "planned", **changes))
    assert run().run.summary["rounds"] == 1


def test_a_server_waits_for_the_process_that_still_works_in_its_folder(tmp_path):
    folder, told, now = tmp_path / "run", [], [0.0]
    wait_for(folder, told.append)  # There is nothing to wait for yet.
    first = Checkpoint(0, State({}, {}))
    held = RunFolder.create(folder, {RUN: "{}"}, first)

    def clock():
        now[0] += 1.0
        if now[0] == 4.0:
            held.close()
        return now[0]

    wait_for(folder, told.append, seconds=60.0, pause=0.0, clock=clock)
    assert len(told) == 1
    assert "works in this folder" in told[0]
    with RunFolder.open(folder), pytest.raises(FolderInUseError):
        wait_for(folder, told.append, seconds=1.5, pause=0.0, clock=clock)
