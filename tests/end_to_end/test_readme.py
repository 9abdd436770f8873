"""Every block of README.md is run as it stands, from a fresh checkout: `make readme`."""

from pathlib import Path

import pytest

from pages import ROOT, blocks, checkout, run

README = ROOT / "README.md"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    quickstart, afterwards, python = blocks(README)
    assert "adapter: runs/quickstart/adapter" in run(quickstart, folder)
    run(afterwards, folder)
    assert (folder / "small" / "adapter_config.json").is_file()
    assert (folder / "runs" / "other" / "summary.json").is_file()
    lines = run(python, folder).splitlines()
    assert [line[:7] for line in lines if line.startswith("round ")] == ["round 1", "round 2"]
    assert (folder / "out" / "adapter_config.json").is_file()


def test_the_readme_takes_two_minutes() -> None:
    words = README.read_text(encoding="utf-8").split()
    assert len(words) < 900  # some 450 read in two minutes; the others are code and links


def test_the_picture_is_there_and_asks_no_other_host() -> None:
    picture = (ROOT / "docs" / "assets" / "quickstart.svg").read_text(encoding="utf-8")
    assert "polyrank&#160;run&#160;quickstart" in picture
    assert "url(http" not in picture
    assert len(picture) < 200_000
