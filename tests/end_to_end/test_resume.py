"""A run that is killed, or finds the disk full, and is resumed ends with the same bytes."""

import pytest

from kill_runs import driven

KILLS, FULL = 30, 12


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return driven("kill", KILLS, tmp_path_factory.mktemp("killed"))


def test_every_killed_run_ends_with_the_same_bytes(killed):
    assert len(killed["runs"]) == KILLS
    for one in killed["runs"]:
        assert one["ended"][0] == "SIGKILL", one
        assert one["ended"][-1] == "exit 0", one
        assert one["differing"] == [], one


def test_the_kills_hit_the_writing_of_checkpoints_and_updates(killed):
    places = [one["moment"] for one in killed["runs"]]
    for place in ("checkpoints/", "updates/", "half of", "from outside"):
        assert sum(place in moment for moment in places) >= 5, places
    assert sum(len(one["ended"]) == 3 for one in killed["runs"]) >= 10, "killed twice"


def test_the_run_compared_is_a_whole_one(killed):
    expected = {"adapter/adapter_model.safetensors", "rounds.jsonl", "summary.json", "base.json"}
    assert expected <= set(killed["files"])
    assert any(name.startswith("checkpoints/round-00004/") for name in killed["files"])
    assert not any("partial" in name for name in killed["files"])


def test_a_disk_that_is_full_at_any_write_is_said_and_costs_nothing(tmp_path):
    report = driven("full", FULL, tmp_path)
    assert len(report["runs"]) == FULL
    for one in report["runs"]:
        assert one["ended"] == ["exit 7", "exit 0"], one
        assert one["differing"] == [], one
    assert report["said"].count("could not be written") == FULL
    assert "Traceback" not in report["said"]


def test_nothing_is_left_beside_the_folders(killed):
    assert killed["beside"] == []
