import fcntl
import json
import math
import re
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyrank.compare import figures
from polyrank.run import RunFolder
from runs import lines_with, polyrank, process, widest, write_recipe

RULES = ("--rules", "flexlora,flexlora:delta,fedit", "--seeds", "2", "--control", "weakest")
TUNED = ("--rules", "flexlora,fedit", "--seeds", "2", "--tune", "--rates")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison in out/; its recipe and what it printed lie beside it."""
    folder = tmp_path_factory.mktemp("compare")
    recipe = write_recipe(folder)
    done = polyrank("compare", recipe, *RULES, "--out", folder / "out")
    assert done.code == 0, done.err
    (folder / "out.txt").write_text(done.out, encoding="utf-8")
    (folder / "err.txt").write_text(done.err, encoding="utf-8")
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """The finished comparison and its recipe, to be changed."""
    return Path(shutil.copytree(place, tmp_path / "copy"))


def read(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def runs_of(out: Path) -> list[Path]:
    """The folders of all runs, in order of name."""
    return sorted(file.parent for file in out.glob("*/lr-*/seed-*/run.json"))


def timeless(value: Any) -> Any:
    """The same without seconds, which alone may differ."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def times(out: Path) -> dict[Path, int]:
    """When each checkpoint was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/checkpoints/*/*")}


# --- a finished comparison ---


def test_each_method_and_seed_has_a_run_folder_of_its_own(place: Path) -> None:
    named = [str(run.relative_to(place / "out")) for run in runs_of(place / "out")]
    methods = ("fedit-all-weakest", "flexlora", "flexlora-all-weakest", "flexlora-delta")
    assert named == [f"{one}/lr-0.01/seed-{seed}" for one in methods for seed in (0, 1)]
    assert polyrank("inspect", place / "out" / named[0]).code == 0


def test_all_methods_of_a_seed_have_the_same_clients_in_every_round(place: Path) -> None:
    found = read(place / "out" / "compare.json")
    assert [(one["seed"], one["same"]) for one in found["agreement"]] == [(0, True), (1, True)]
    sampled: dict[str, set[str]] = {}
    for run in runs_of(place / "out"):
        clients = [record["clients"] for record in RunFolder.peek(run).records()]
        sampled.setdefault(run.name, set()).add(json.dumps(clients))
    assert {seed: len(each) for seed, each in sampled.items()} == {"seed-0": 1, "seed-1": 1}
    assert sampled["seed-0"] != sampled["seed-1"]


def test_the_rule_of_one_rank_and_the_control_have_every_client_at_the_weakest(place: Path) -> None:
    for run in runs_of(place / "out"):
        types = set(read(run / "fleet.json")["clients"].values())
        assert types == ({"T1"} if "all-weakest" in str(run) else {"T1", "T2"})


def test_the_base_is_evaluated_once_a_seed(place: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        texts = {(r / "base.json").read_bytes() for r in runs_of(place / "out") if r.name == seed}
        assert len(texts) == 1
    found = read(place / "out" / "compare.json")["base"]["per_seed"]
    first = read(place / "out/flexlora/lr-0.01/seed-0/summary.json")
    assert found[0] == {"seed": 0, **first["base"]}


def test_a_base_that_was_evaluated_is_taken_over_by_methods_that_are_added(place: Path) -> None:
    out = place / "base-kept"
    command = ("compare", place / "tiny.toml", "--seeds", "1", "--out", out, "--no-figures")
    assert polyrank(*command, "--rules", "flexlora").code == 0
    file = out / "flexlora/lr-0.01/seed-0/base.json"
    file.write_text(file.read_text() + "\n")  # To be told from one that was made anew.
    assert polyrank(*command, "--rules", "flexlora,flexlora:delta,fedit").code == 0
    for added in ("flexlora-delta", "fedit-all-weakest"):
        assert (out / added / "lr-0.01/seed-0/base.json").read_bytes() == file.read_bytes()


def test_runs_of_every_kind_can_be_inspected_and_exported(place: Path) -> None:
    out = place / "kinds"
    rules = (
        "--rules",
        "flexlora+slora,flora+fedit,hetlora+fedit",
        "local.sparse_rounds=1",
        "--seeds",
        "1",
    )
    done = polyrank("compare", place / "tiny.toml", *rules, "--out", out, "--no-figures")
    assert done.code == 0, done.err
    for run in runs_of(out):
        shown = polyrank("inspect", run, "--sites")
        assert shown.code == 0, shown.err
        sites = re.findall(r"^ [01]\.(?:mlp|self_attn)\.\w+_proj ", shown.out, re.MULTILINE)
        assert len(sites) == 14
        assert polyrank("export", run, run / "small", "--rank", 1).code == 0


def test_means_spreads_and_differences_are_those_of_the_runs(place: Path) -> None:
    found = read(place / "out" / "compare.json")
    assert [one["label"] for one in found["methods"]] == [
        "flexlora",
        "flexlora:delta",
        "fedit, all weakest",
        "flexlora, all weakest",
    ]
    assert found["complete"]
    out = place / "out"
    delta = found["methods"][1]
    summaries = [read(out / f"flexlora-delta/lr-0.01/seed-{s}/summary.json") for s in (0, 1)]
    losses = [summary["final"]["unseen"]["loss"] for summary in summaries]
    assert delta["mean"]["unseen"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)
    spread = abs(losses[0] - losses[1]) / math.sqrt(2)
    assert delta["spread"]["unseen"]["loss"] == pytest.approx(spread, rel=1e-9)
    for seed, told in enumerate(delta["difference"]["per_seed"]):
        ours, first = (
            read(out / name / f"lr-0.01/seed-{seed}/evaluation.json")["clients"]
            for name in ("flexlora-delta", "flexlora")
        )
        for who, ids in (("seen", range(4)), ("unseen", (4, 5))):
            ids = [f"task{i}" for i in ids]
            each = [ours[id]["loss"] - first[id]["loss"] for id in ids]
            assert told[who]["loss"]["clients"] == len(ids)
            assert told[who]["loss"]["mean"] == pytest.approx(statistics.mean(each), rel=1e-9)
            se = statistics.stdev(each) / math.sqrt(len(each))
            assert told[who]["loss"]["se"] == pytest.approx(se, rel=1e-9)
    means = [told["seen"]["loss"]["mean"] for told in delta["difference"]["per_seed"]]
    assert delta["difference"]["mean"]["seen"]["loss"] == pytest.approx(sum(means) / 2, rel=1e-9)
    assert found["methods"][0]["difference"] is None


def test_costs_and_energy_are_those_of_the_rounds(place: Path) -> None:
    one = read(place / "out" / "compare.json")["methods"][0]
    records = RunFolder.peek(place / "out/flexlora/lr-0.01/seed-0").records()
    assert one["runs"][0]["bytes_up"] == sum(record["bytes_up"] for record in records)
    shares = [
        sum(lost for _, lost in r["energy"].values()) / sum(e for e, _ in r["energy"].values())
        for r in records
    ]
    assert one["runs"][0]["discarded"] == pytest.approx(sum(shares) / 2, rel=1e-9)


def test_the_table_fits_and_progress_tells_which_run_of_how_many(place: Path) -> None:
    out, err = ((place / name).read_text() for name in ("out.txt", "err.txt"))
    assert lines_with(out, "fedit, all", "0.01", "±"), "its name goes on in the next line"
    texts = [line for line in out.splitlines() if str(place) not in line]
    assert widest("\n".join(texts)) <= 80
    assert re.findall(r"^(\d)/8  ", err, re.MULTILINE) == [*"12345678"]
    assert lines_with(err, "3/8  fedit, all weakest, rate 0.01, seed 0: test loss")
    assert (place / "out" / "compare.md").read_text().count("| flexlora:delta |") == 3


def test_figures_are_drawn_as_svg_and_png_and_again_with_the_same_bytes(copied: Path) -> None:
    figures = copied / "out" / "figures"
    names = ("energy-discarded", "loss-by-bytes", "loss-by-category", "loss-by-round")
    files = {file.name: file.read_bytes() for file in figures.iterdir()}
    assert sorted(files) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    shutil.rmtree(figures)
    assert polyrank("resume", copied / "out").code == 0
    assert {file.name: file.read_bytes() for file in figures.iterdir()} == files


def test_json_is_all_there_is_on_stdout(place: Path) -> None:
    told = json.loads(polyrank("resume", place / "out", "--json").out)
    results = read(place / "out" / "compare.json")
    assert told == {"folder": str(place / "out"), "finished_before": True, **results}


# --- going on ---


def test_the_same_command_again_trains_nothing_and_shows_the_same(copied: Path) -> None:
    before = times(copied / "out")
    again = polyrank("compare", copied / "tiny.toml", *RULES, "--out", copied / "out")
    # The recipe's folder was copied, so its sources lie elsewhere.
    assert again.code == 1
    assert "model.source: was" in again.err
    again = polyrank("resume", copied / "out")
    assert again.code == 0, again.err
    shown = (copied / "out.txt").read_text().splitlines()
    first, *rest = again.out.splitlines()
    assert first == f"{copied / 'out'}: finished before, nothing was trained"
    assert rest[:-1] == shown[:-1]  # The last line is the folder.
    assert "8 runs finished before" in again.err
    assert times(copied / "out") == before


def test_rules_and_seeds_may_be_added_and_only_what_is_new_is_run(place: Path) -> None:
    out = place / "more"
    recipe = place / "tiny.toml"
    begun = polyrank("compare", recipe, "--rules", "flexlora,fedit", "--seeds", "1", "--out", out)
    assert begun.code == 0, begun.err
    before = times(out)
    done = polyrank("compare", recipe, *RULES, "--out", out)
    assert done.code == 0, done.err
    assert {path: when for path, when in times(out).items() if path in before} == before
    assert timeless(read(out / "compare.json")) == timeless(read(place / "out/compare.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("rounds=3", *RULES), "rounds: was 2, is 3"),
        (("local.steps=3", *RULES), "local.steps: was 2, is 3"),
        (("--rules", "fedit,flexlora", "--seeds", "2", "--control", "weakest"), "rules: was"),
        (("--rules", "flexlora,flexlora:delta,fedit", "--control", "T2"), "control: was 'weakest'"),
    ],
)
def test_another_request_in_the_same_folder_is_refused(
    place: Path, change: tuple[str, ...], words: str
) -> None:
    before = (place / "out" / "comparison.toml").read_bytes()
    done = polyrank("compare", place / "tiny.toml", *change, "--out", place / "out")
    assert done.code == 1
    assert words in done.err
    assert (place / "out" / "comparison.toml").read_bytes() == before


def test_a_folder_of_something_else_is_refused(place: Path) -> None:
    run = place / "out/flexlora/lr-0.01/seed-0"
    done = polyrank("compare", place / "tiny.toml", *RULES, "--out", run)
    assert done.code == 1
    assert "holds no comparison" in done.err


def test_what_cannot_be_loaded_ends_the_comparison_before_its_folder_is_made(place: Path) -> None:
    recipe, out = place / "tiny.toml", place / "none"
    done = polyrank("compare", recipe, "data.completion=nowhere", *RULES, "--out", out)
    assert done.code == 1
    assert "nowhere" in done.err
    assert not out.exists()


def test_one_process_at_a_time_carries_out_a_comparison(copied: Path) -> None:
    with (copied / "out" / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = polyrank("resume", copied / "out")
    assert done.code == 1
    assert "another process" in done.err


def test_without_matplotlib_it_is_told_how_to_get_it_before_anything_is_begun(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    done = polyrank("compare", place / "tiny.toml", *RULES, "--out", place / "undrawn")
    assert done.code == 1
    assert "pip install 'polyrank[report]'" in done.err
    assert not (place / "undrawn").exists()


def test_a_killed_comparison_goes_on_to_the_same_results(place: Path, tmp_path: Path) -> None:
    # --no-figures: they need nothing of the kill.
    command = ("compare", place / "tiny.toml", *RULES, "--no-figures", "--out", tmp_path / "out")
    started = process(tmp_path, *command)
    second = tmp_path / "out/flexlora-delta/lr-0.01/seed-0/checkpoints/round-00001"
    for _ in until(lambda: second.exists() or started.poll() is not None):
        pass
    started.send_signal(signal.SIGKILL)
    started.communicate()
    unfinished = [run for run in runs_of(tmp_path / "out") if not (run / "summary.json").exists()]
    assert len(runs_of(tmp_path / "out")) < 8 or unfinished
    first = tmp_path / "out/flexlora/lr-0.01/seed-0/checkpoints/round-00002/manifest.json"
    before = first.stat().st_mtime_ns
    done = polyrank(*command)
    assert done.code == 0, done.err
    assert first.stat().st_mtime_ns == before
    told, expected = (read(out / "compare.json") for out in (tmp_path / "out", place / "out"))
    assert timeless(told) == timeless(expected)


def until(condition: Any) -> Iterator[None]:
    """Yield every so often until a condition holds."""
    while not condition():
        time.sleep(0.002)
        yield


def test_a_wish_to_stop_is_heard_and_says_how_to_go_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = process(tmp_path, "compare", place / "tiny.toml", "rounds=50", *RULES, "--out", out)
    begun = lambda: (out / "compare.md").exists() or runs_of(out)  # noqa: E731
    for _ in until(lambda: begun() or started.poll() is not None):
        pass
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate()
    assert started.returncode == 130
    assert f"polyrank resume {out}" in err


# --- rates ---


def test_each_method_goes_on_at_the_rate_of_the_lowest_validation_loss(place: Path) -> None:
    recipe, out = place / "tiny.toml", place / "tuned"
    done = polyrank("compare", recipe, *TUNED, "1e-4,1e-2,1e30", "--out", out, "--no-figures")
    assert done.code == 0, done.err
    found = read(out / "compare.json")
    assert not (out / "figures").exists()
    for one in found["methods"]:
        trials = {trial["rate"]: trial for trial in one["tuning"]["trials"]}
        assert (one["rate"], one["tuning"]["edge"]) == (1e-2, None)
        assert trials[1e-2]["validation_loss"] < trials[1e-4]["validation_loss"]
        assert trials[1e30]["validation_loss"] is None
        assert "round 1" in trials[1e30]["failure"]
        assert [run["folder"].split("/", 1)[1] for run in one["runs"]] == [
            "lr-0.01/seed-0",
            "lr-0.01/seed-1",
        ]
        records = RunFolder.peek(out / one["runs"][0]["folder"]).records()
        loss = records[-1]["evaluation"]["server"]["seen"]["loss"]
        assert trials[1e-2]["validation_loss"] == loss
        assert trials[1e-2]["round"] == 2
    assert found["failures"] == []
    # Test parts are scored at the chosen rate only.
    scored = {
        run.relative_to(out).parts[1] for run in runs_of(out) if (run / "summary.json").exists()
    }
    assert scored == {"lr-0.01"}
    failed = [run for run in runs_of(out) if (run / "failure.json").exists()]
    assert [run.relative_to(out).parts[1] for run in failed] == ["lr-1e+30"] * 2
    assert lines_with(done.out, "fedit, all weakest", "[", "failed")
    before = times(out)
    again = polyrank("resume", out)
    assert again.code == 0, again.err
    assert "8 runs finished before" in again.err
    assert times(out) == before
    assert timeless(read(out / "compare.json")) == timeless(found)


def test_a_grid_whose_edge_is_best_grows_twice_and_says_so(place: Path) -> None:
    recipe, out = place / "tiny.toml", place / "edge"
    rules = ("--rules", "flexlora", "--seeds", "1", "--tune", "--rates", "1e-6,2e-6")
    done = polyrank("compare", recipe, *rules, "--out", out, "--no-figures")
    assert done.code == 0, done.err
    [one] = read(out / "compare.json")["methods"]
    tried = [(trial["rate"], trial["extension"]) for trial in one["tuning"]["trials"]]
    assert tried == [(1e-6, False), (2e-6, False), (4e-6, True), (8e-6, True)]
    assert (one["rate"], one["tuning"]["edge"]) == (8e-6, "high")
    assert "edge of those tried" in done.out


# --- failures ---


def test_a_run_that_diverges_is_told_of_and_the_others_go_on(place: Path) -> None:
    out = place / "diverged"
    rules = ("--rules", "flexlora,flexlora:delta", "--seeds", "1")
    done = polyrank("compare", place / "tiny.toml", "local.lr=1e30", *rules, "--out", out)
    assert done.code == 1
    found = read(out / "compare.json")
    assert [one["method"] for one in found["failures"]] == ["flexlora", "flexlora:delta"]
    assert not found["complete"]
    assert found["methods"][0]["mean"]["seen"]["loss"] is None
    assert "not all of the comparison came to a result" in done.err
    assert lines_with(done.out, "flexlora:delta (0/1)", "–")


def test_a_run_that_fails_otherwise_fails_alone_and_is_tried_again(place: Path) -> None:
    out = place / "blocked"
    blocked = out / "flexlora-delta/lr-0.01/seed-0"
    command = ("compare", place / "tiny.toml", "--seeds", "1", "--out", out, "--no-figures")
    assert polyrank(*command, "--rules", "flexlora").code == 0
    blocked.mkdir(parents=True)
    more = ("--rules", "flexlora,flexlora:delta,fedit")
    done = polyrank(*command, *more)
    assert done.code == 1
    found = read(out / "compare.json")
    assert [one["method"] for one in found["failures"]] == ["flexlora:delta"]
    assert "expected a run folder" in found["failures"][0]["reason"]
    assert found["methods"][2]["difference"]["mean"]["seen"]["loss"] is not None
    blocked.rmdir()
    assert polyrank("resume", out).code == 0
    assert read(out / "compare.json")["complete"]


def test_methods_that_asked_other_clients_are_flagged(copied: Path) -> None:
    file = copied / "out/fedit-all-weakest/lr-0.01/seed-1/rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["attempt"] = 1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = polyrank("resume", copied / "out")
    found = read(copied / "out" / "compare.json")
    assert [one["same"] for one in found["agreement"]] == [True, False]
    assert "NOT COMPARABLE, seed 1: fedit, all weakest and flexlora: other clients in round 2" in (
        " ".join(done.out.split())
    )
