"""The server of a run whose clients are elsewhere: its folder, what it refuses, going on."""

import io
import json

import pytest
from rich.console import Console

from letters import Letters, Lost
from polyrank.aggregation import State
from polyrank.config.flower import APP_KEYS, app_settings, from_run_config, to_run_config
from polyrank.config.reading import checked
from polyrank.errors import FolderInUseError, PolyrankError, RecipeError, RoundFailedError
from polyrank.remote.hosting import side_of
from polyrank.remote.server import check, serve, wait_for
from polyrank.report.progress import Terminal
from polyrank.run import Checkpoint, RunFolder
from polyrank.run.folder import RUN
from polyrank.runner.runner import Attendance, start
from remotes import orders

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


def run_config(out, **changes):
    config = {**APP_KEYS, **to_run_config(checked({**CONTENT, **changes}, "recipe"))}
    return {**config, "app.out": str(out)}


def served(config, trouble=None):
    parts = {n: side_of(config, {"partition-id": n, "num-partitions": 3}) for n in range(3)}
    between = Letters(parts, trouble)
    return between, lambda: serve(from_run_config(config), app_settings(config), between, "run")


def here(folder):
    """Carry the same recipe out in this process."""
    quiet = Terminal(Console(file=io.StringIO()))
    return start(checked(CONTENT, "recipe"), folder, Attendance(quiet, lambda: False)).folder


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_over_letters_is_the_run_of_one_process_and_goes_on_after_a_failure(tmp_path, capsys):
    """Its second round fails, then a new server goes on in the same folder."""
    expected = adapter(here(tmp_path / "here"))
    config = run_config(tmp_path / "away")

    def second(letter, payload):
        if letter.kind == "train" and len(orders(between)) > 3:
            return Lost("\x1b[31mcable cut\nhere")
        return payload

    between, run = served(config, second)
    with pytest.raises(RoundFailedError, match="round 2: fewer than 50%"):
        run()
    told = capsys.readouterr().err
    assert "cable cut here" in told
    assert "\x1b[31mcable" not in told, "what others wrote does not steer the terminal"
    assert "asked 3 clients" in told

    again, run = served(config)
    outcome = run()
    assert outcome.folder == tmp_path / "away"
    assert adapter(outcome.folder) == expected
    assert len(orders(again)) == 3, "of the second round alone"
    assert len((outcome.folder / "rounds.jsonl").read_text().splitlines()) == 2

    finished, run = served(config)
    assert run().summary == json.loads((outcome.folder / "summary.json").read_text())
    assert finished.sent == [], "nobody is asked for what is finished"


def test_a_folder_of_another_run_is_not_gone_on_with(tmp_path):
    (tmp_path / "notes").mkdir()
    _, run = served(run_config(tmp_path / "notes"))
    with pytest.raises(PolyrankError, match="notes"):
        run()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"source": "sample", "pooled": True}}, r"data\.pooled"),
        ({"control": "weakest"}, "control: a run over Flower has none"),
    ],
)
def test_what_needs_all_data_in_one_process_is_refused(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        check(checked({**CONTENT, **changes}, "recipe"))


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
    assert run().summary["rounds"] == 1


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
