"""Runs with split clients as people see them: set-up, records, resuming, and bad cuts."""

import json
from pathlib import Path

import pytest

import federations
from polyrank.errors import ModelError
from polyrank.model import load_model
from polyrank.planning import CutPoint, Fleet
from runs import Finished, polyrank, widest, write_recipe

LEAK = (
    "split: the server that trains the tails sees activations, from which most tokens can be "
    "recovered, and the labels; see docs/explanation/privacy.md"
)
CUT = ("fleet.cuts.T1=1", "fleet.clients={task0='T1',task1='T2',task2='T1',task3='T2'}")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """One round in which half of the clients run the first of two blocks."""
    folder = tmp_path_factory.mktemp("split")
    recipe = write_recipe(folder)
    given = ("rounds=1", "sampling.fraction=1", "split.noise=0.0")
    return folder / "run", polyrank("run", recipe, *CUT, *given, "--out", folder / "run")


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_split_run_says_who_runs_what_and_what_leaks(begun: tuple[Path, Finished]) -> None:
    folder, done = begun
    assert done.code == 0, done.err
    assert LEAK in words(done.err)
    assert "T1 2 1 at 14 matrices block 0 of 2" in words(done.err)
    assert "T2 2 2 at 8 matrices, 6 at 6 matrices whole" in words(done.err)
    assert "wire MiB lost seconds" in words(done.err)
    assert "MiB of that are activations and gradients" in words(done.out)
    texts = [line for line in (done.out + done.err).splitlines() if str(folder) not in line]
    assert widest("\n".join(texts)) <= 80
    inspected = polyrank("inspect", folder)
    assert "T1 2 1 at 14 matrices block 0 of 2" in words(inspected.out)
    assert "wire MiB" in inspected.out


def test_a_split_run_keeps_who_was_cut_where_and_what_travelled(
    begun: tuple[Path, Finished],
) -> None:
    folder, _ = begun
    fleet = json.loads((folder / "fleet.json").read_text())
    assert (fleet["cuts"], fleet["blocks"]) == ({"T1": 1}, 2)
    assert json.loads((folder / "run.json").read_text())["settings"]["cuts"] == {"T1": 1}
    (line,) = (folder / "rounds.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["cuts"] == {"1": 2, "whole": 2}
    assert 0 < record["wire_up"] < record["bytes_up"]
    sites = load_model(folder.parent / "base", device="cpu").spec.sites
    held = {"T1": [s for s in sites if s.block == 0], "T2": sites}
    factors = sum(
        4 * fleet["ranks"][name][site.name] * (site.m + site.n)
        for name in fleet["clients"].values()
        for site in held[name]
    )
    assert record["bytes_up"] - record["wire_up"] == factors
    assert record["bytes_down"] - record["wire_down"] == factors
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["wire_up"], summary["wire_down"]) == (record["wire_up"], record["wire_down"])


def test_a_split_run_that_goes_on_says_again_what_leaks(begun: tuple[Path, Finished]) -> None:
    folder, _ = begun
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("rounds = 1\n", "rounds = 2\n"))
    resumed = polyrank("resume", folder)
    assert resumed.code == 0, resumed.err
    assert LEAK in words(resumed.err)
    assert "going on after round 1" in resumed.err
    recipe.write_text(recipe.read_text().replace("T1 = 1\n\n[lora]", "T2 = 1\n\n[lora]"))
    recipe.write_text(recipe.read_text().replace("rounds = 2\n", "rounds = 3\n"))
    other = polyrank("resume", folder)
    assert other.code == 1
    assert "settings.cuts.T1: was 1, is None" in other.err


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("fleet.cuts.T1=2", "fleet.cuts.T1: cut: expected cuts within 1…1, as the model has 2"),
        ("fleet.cuts.T2=[1,2]", "fleet.cuts.T2: cut: expected cuts within 1…1"),
        ("fleet.cuts.T3=1", "fleet.cuts: no LoRA type ['T3']; there are ['T1', 'T2']"),
    ],
)
def test_a_cut_that_cannot_be_is_told_before_anything_is_begun(
    begun: tuple[Path, Finished], tmp_path: Path, cut: str, said: str
) -> None:
    recipe = begun[0].parent / "tiny.toml"
    done = polyrank("run", recipe, cut, "--out", tmp_path / "run")
    assert done.code == 1
    assert said in words(done.err)
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_block_cannot_be_cut(tmp_path: Path) -> None:
    data = federations.clients()
    kinds = dict.fromkeys((id for id, client in data.items() if client.seen), "small")
    fleet = Fleet.table(kinds, types=federations.TYPES, cuts={"small": CutPoint(1)})
    with pytest.raises(ModelError, match=r"fleet\.cuts\.small: .*model of 1 block cannot be cut"):
        federations.opened(tmp_path / "run", data=data, fleet=fleet)
    assert not (tmp_path / "run").exists()
