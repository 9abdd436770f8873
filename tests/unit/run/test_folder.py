"""Run folders: one owner, nothing overwritten, checkpoints that are whole or set aside."""

import json
import os
import subprocess
import sys

import pytest
import torch

from polyrank.aggregation import State, Update
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import CheckpointError, FolderExistsError, FolderInUseError, RunError
from polyrank.run.checkpoint import Checkpoint, EarlyStoppingState
from polyrank.run.folder import RunFolder

FILES = {"run.json": "{}\n", "recipe.toml": "name = 'x'\n"}


def checkpoint(number: int, best: bool = False) -> Checkpoint:
    state = State({"q/u": torch.full((3, 2), float(number))}, {"seen": number})
    return Checkpoint(number, state, EarlyStoppingState(1.5, 1, 0), state if best else None)


@pytest.fixture
def folder(tmp_path):
    with RunFolder.create(tmp_path / "run", FILES, checkpoint(0)) as made:
        yield made


def names(path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*") if p.name != ".lock"}


def test_a_new_folder_appears_with_all_that_it_begins_with(folder, tmp_path):
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    assert {"run.json", "recipe.toml", "rounds.jsonl", "updates"} <= names(folder.path)
    assert folder.load_checkpoint().round == 0
    assert folder.records() == []


@pytest.mark.parametrize("what", ["empty folder", "full folder", "file", "dangling link"])
def test_nothing_that_exists_is_ever_overwritten(tmp_path, what):
    path = tmp_path / "run"
    if what == "file":
        path.write_text("mine")
    elif what == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        if what == "full folder":
            (path / "thesis.txt").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(FolderExistsError, match="exists already"):
        RunFolder.create(path, FILES, checkpoint(0))
    assert names(tmp_path) == before


def test_a_folder_whose_making_fails_is_not_there(tmp_path, monkeypatch):
    def no(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(RunFolder, "save_checkpoint", no)
    with pytest.raises(RuntimeError, match="no more"):
        RunFolder.create(tmp_path / "deep" / "run", FILES, checkpoint(0))
    assert names(tmp_path) == {"deep"}


def test_what_a_killed_making_left_is_cleared_away(tmp_path):
    left = tmp_path / ".run.partial"
    (left / "checkpoints" / "round-00007").mkdir(parents=True)
    (left / "recipe.toml").write_text("of another run")
    (left / "base.json").write_text("{}")
    with RunFolder.create(tmp_path / "run", FILES, checkpoint(0)) as folder:
        assert folder.load_checkpoint().round == 0
        assert "base.json" not in names(folder.path)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_a_parent_that_is_a_file_is_an_error_of_the_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run", FILES, checkpoint(0))


@pytest.mark.parametrize("way", [RunFolder.open, RunFolder.peek])
def test_another_folder_is_neither_taken_for_a_run_nor_touched(tmp_path, way):
    (tmp_path / "mine.txt").touch()
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunError, match=r"expected a run folder with a run\.json"):
            way(path)
    assert names(tmp_path) == {"mine.txt"}
    assert not (tmp_path / ".lock").exists()


def test_two_processes_cannot_use_one_folder(folder):
    probe = (
        "import sys; from pathlib import Path\n"
        "from polyrank.run.folder import RunFolder\n"
        "from polyrank.errors import FolderInUseError\n"
        "try: RunFolder.open(Path(sys.argv[1]))\n"
        "except FolderInUseError as error: print(error)\n"
    )
    run = [sys.executable, "-c", probe, str(folder.path)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert f"process {os.getpid()} works in this folder" in said
    folder.close()
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == ""


def test_one_process_cannot_open_a_folder_twice_but_look_into_it(folder):
    with pytest.raises(FolderInUseError):
        RunFolder.open(folder.path)
    assert RunFolder.peek(folder.path).load_checkpoint().round == 0


def test_a_checkpoint_comes_back_with_the_best_and_the_progress(folder):
    folder.save_checkpoint(checkpoint(1, best=True))
    got = folder.load_checkpoint()
    assert (got.round, got.progress, got.state.scalars) == (
        1,
        EarlyStoppingState(1.5, 1, 0),
        {"seen": 1},
    )
    assert torch.equal(got.state.tensors["q/u"], torch.full((3, 2), 1.0))
    assert torch.equal(got.best.tensors["q/u"], torch.full((3, 2), 1.0))


def test_the_last_two_checkpoints_are_kept(folder):
    for number in (1, 2, 3):
        folder.save_checkpoint(checkpoint(number))
    kept = {p.name for p in (folder.path / "checkpoints").iterdir()}
    assert kept == {"round-00002", "round-00003"}


def test_a_checkpoint_that_a_kill_kept_goes_once_the_newer_ones_are_read(folder, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("polyrank.run.checkpoint.prune", lambda _: None)
        for number in (1, 2, 3):
            folder.save_checkpoint(checkpoint(number))
    RunFolder.peek(folder.path).load_checkpoint()
    assert len(list((folder.path / "checkpoints").iterdir())) == 4, "a reader changes nothing"
    assert folder.load_checkpoint().round == 3
    kept = {p.name for p in (folder.path / "checkpoints").iterdir()}
    assert kept == {"round-00002", "round-00003"}


PARTS = (
    "state.safetensors",
    "state.json",
    "best.safetensors",
    "best.json",
    "progress.json",
    "manifest.json",
)
DAMAGE = {
    "emptied": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1] if p.suffix != ".json" else b'{"a'),
    "flipped": lambda p: p.write_bytes(p.read_bytes()[:-2] + b"!" + p.read_bytes()[-1:]),
    "gone": lambda p: p.unlink(),
    "another's": lambda p: p.write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(folder, part, damage):
    for number in (1, 2):
        folder.save_checkpoint(checkpoint(number, best=True))
    damage(folder.path / "checkpoints" / "round-00002" / part)
    assert RunFolder.peek(folder.path).load_checkpoint().round == 1
    got = folder.load_checkpoint()
    assert got.round == 1
    assert got.best is not None
    (note,) = folder.notes
    assert "round-00002 is damaged" in note
    assert "round 1 is used" in note
    assert (folder.path / "checkpoints" / "damaged-round-00002").is_dir()
    folder.save_checkpoint(checkpoint(2, best=True))
    assert folder.load_checkpoint().round == 2


def test_if_all_are_damaged_that_is_said_every_time(folder):
    folder.save_checkpoint(checkpoint(1))
    for number in (0, 1):
        (folder.path / "checkpoints" / f"round-0000{number}" / "state.json").write_text("?")
    for _ in range(2):  # The first time must not make the second believe in a new run.
        with pytest.raises(CheckpointError, match=r"round-00001: state\.json .*round-00000: state"):
            folder.load_checkpoint()


def test_half_made_half_deleted_and_foreign_things_do_not_confuse(folder):
    folder.save_checkpoint(checkpoint(1))
    root, inside = folder.path, folder.path / "checkpoints"
    folder.close()
    (inside / ".round-00002.partial").mkdir()
    (inside / ".round-00000.old").mkdir()
    (inside / "round-00003 (copy)").mkdir()
    (inside / "round-notes").touch()
    (root / ".summary.json.partial").touch()
    (root / ".adapter.x1").mkdir()
    (root / "..adapter.new.x2").mkdir()
    (root / "updates" / ".1-0-c.safetensors.partial").touch()
    (root / "updates" / "README").touch()
    (root / ".control.partial").mkdir()  # Another run is being made in there.
    with RunFolder.open(root) as again:
        assert again.load_checkpoint().round == 1
        again.clear_updates(last=9)
    left = {p for p in names(root) if "." in p and not p.startswith("checkpoints/round-0000")}
    assert left == {"run.json", "recipe.toml", "rounds.jsonl", ".control.partial"}


def record(number: int) -> dict:
    return {"round": number, "text": "ä\u2028"}


@pytest.mark.parametrize("kept", [1, 9, -2, -1])
def test_records_come_back_and_a_cut_last_line_is_dropped(folder, kept):
    for number in (1, 2):
        folder.append_record(record(number))
    with (folder.path / "rounds.jsonl").open("ab") as file:
        file.write(json.dumps(record(3), ensure_ascii=False).encode()[:-3][:kept])
    assert folder.records() == [record(1), record(2)]


def test_records_without_a_checkpoint_are_dropped_on_resume(folder):
    for number in (1, 2):
        folder.append_record(record(number))
    folder.keep_records(1)
    assert folder.records() == [record(1)]
    folder.append_record(record(2))
    assert folder.records() == [record(1), record(2)]


def test_records_that_are_missing_are_an_error_and_nothing_is_dropped(folder):
    folder.append_record(record(1))
    with pytest.raises(RunError, match="expected the records of rounds 1 to 2"):
        folder.keep_records(2)
    assert folder.records() == [record(1)]


def update(client: str, round: int = 1, assignment: str = "x") -> Update:
    adapter = Adapter({"q": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    return Update(client, round, 0, assignment, 5, adapter, {"loss": 1.0})


@pytest.mark.parametrize(
    "client", ["plain", "../../etc/passwd", "a b", "ü/ß", "x" * 300, ".", "", "nul\0"]
)
def test_any_name_of_a_client_is_safe_as_a_file(folder, client):
    folder.save_update(update(client))
    (path,) = (folder.path / "updates").iterdir()
    assert path.parent == folder.path / "updates"
    assert folder.load_update(1, 0, client, "x").client == client
    assert folder.factors(1, 0, client, "q").rank == 1


def test_names_that_differ_in_case_or_far_behind_are_two_files(folder):
    for client in ("a", "A", "x" * 300 + "1", "x" * 300 + "2"):
        folder.save_update(update(client))
    assert len({p.name.lower() for p in (folder.path / "updates").iterdir()}) == 4


def test_updates_that_are_damaged_or_of_another_assignment_are_trained_again(folder):
    for client in ("cut", "old", "good"):
        folder.save_update(update(client))
    path = folder.update_path(1, 0, "cut")
    path.write_bytes(path.read_bytes()[:-1])
    assert folder.load_update(1, 0, "cut", "x") is None
    assert folder.load_update(1, 0, "old", "another") is None
    assert folder.load_update(1, 0, "nobody", "x") is None
    assert folder.load_update(1, 0, "good", "x") is not None
    assert len(folder.notes) == 2
    assert [p.name[:8] for p in (folder.path / "updates").iterdir()] == ["1-0-good"]


def test_only_the_updates_of_finished_rounds_are_cleared(folder):
    for number in (1, 9, 10, 123456):
        folder.save_update(update("c", number))
    folder.clear_updates(last=9)
    left = sorted(int(p.name.split("-")[0]) for p in (folder.path / "updates").iterdir())
    assert left == [10, 123456]
