"""Every block of the tutorials runs as it stands, in its order, from an empty folder."""

import json
from pathlib import Path

import pytest

from pages import ROOT, Block, blocks, run

TUTORIALS = ROOT / "docs" / "tutorials"
PLAYED = ("first-run", "own-data", "unequal-devices", "split-clients")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("name", PLAYED)
def test_a_tutorial_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    printed = [run(block, tmp_path) for block in blocks(TUTORIALS / f"{name}.md")]
    print("\n".join(printed))  # for who renews a page: pytest -rP
    check = {"first-run": first_run, "own-data": own_data, "split-clients": split_clients}
    if name in check:
        check[name](tmp_path, "\n".join(printed))


def first_run(folder: Path, printed: str) -> None:
    assert (folder / "small" / "adapter_config.json").is_file()


def own_data(folder: Path, printed: str) -> None:
    assert (folder / "shops-model" / "config.json").is_file()
    scores = json.loads((folder / "runs" / "shops" / "summary.json").read_text())
    assert scores["rounds"] == 4


def split_clients(folder: Path, printed: str) -> None:
    """The page says that the losses agree and that only the cut run has a wire."""
    runs = {
        name: [json.loads(line) for line in (folder / name / "rounds.jsonl").open()]
        for name in ("cut", "whole")
    }
    for cut, whole in zip(runs["cut"], runs["whole"], strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert cut["wire_up"] > 0 == whole["wire_up"]


def test_the_last_tutorial_plays_what_a_test_of_its_own_plays() -> None:
    """`make deploy-demo` is run by test_deploy_demo.py."""
    assert blocks(TUTORIALS / "three-organisations.md") == [Block("sh", "make deploy-demo\n")]


def test_every_tutorial_is_played() -> None:
    pages = {page.stem for page in TUTORIALS.glob("*.md")}
    assert pages == {*PLAYED, "three-organisations"}
