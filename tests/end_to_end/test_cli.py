import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from runs import (
    adapter_bytes,
    command,
    lines_with,
    polyrank,
    process,
    widest,
    write_recipe,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its control; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder)
    done = polyrank("run", recipe, "--out", folder / "run", "--control", "weakest")
    assert done.code == 0, done.err
    (folder / "out.txt").write_text(done.out, encoding="utf-8")
    (folder / "err.txt").write_text(done.err, encoding="utf-8")
    return folder / "run"


def test_a_run_tells_its_set_up_and_rounds_on_stderr_and_its_result_on_stdout(
    finished: Path,
) -> None:
    out, err = ((finished.parent / name).read_text() for name in ("out.txt", "err.txt"))
    assert "4 clients and 2 unseen" in err
    assert lines_with(err, "T2", "2 at 8 matrices, 6 at 6 matrices")
    assert "flexlora:delta, all clients weakest" in err
    assert len(re.findall(r"^ +[12]  ", err, re.MULTILINE)) == 4  # Two rounds, twice.
    assert lines_with(out, "score", "before", "flexlora:delta", "all weakest", "difference")
    assert len(lines_with(out, "seen (4)", "loss")) == 1
    assert len(lines_with(out, "unseen (2)", "exact match")) == 1
    assert "2 rounds in" in out
    # Paths may be longer than a line; nothing else is.
    texts = [line for line in (out + err).splitlines() if str(finished) not in line]
    assert widest("\n".join(texts)) <= 80
    assert "\x1b" not in out + err


def test_the_lines_at_the_end_load_the_adapter(finished: Path) -> None:
    out = (finished.parent / "out.txt").read_text().splitlines()
    at = next(i for i, line in enumerate(out) if line.startswith("adapter: "))
    scope: dict[str, object] = {}
    exec("\n".join(line.strip() for line in out[at + 1 : at + 3]), scope)
    assert isinstance(scope["model"], PeftModel)


def test_the_folder_holds_the_recipe_the_fleet_the_control_and_their_difference(
    finished: Path,
) -> None:
    recipe = tomllib.loads((finished / "recipe.toml").read_text())
    assert (recipe["rounds"], recipe["control"], recipe["engine"]["threads"]) == (2, "weakest", 1)
    fleet = json.loads((finished / "fleet.json").read_text())
    assert sorted(fleet["clients"].values()) == ["T1", "T1", "T2", "T2"]
    assert set(fleet["ranks"]["T1"].values()) == {1}
    control = json.loads((finished / "control" / "fleet.json").read_text())
    assert set(control["clients"].values()) == {"T1"}
    assert (finished / "control" / "base.json").read_bytes() == (
        finished / "base.json"
    ).read_bytes()
    summaries = [
        json.loads((folder / "summary.json").read_text())
        for folder in (finished, finished / "control")
    ]
    assert summaries[0]["base"] == summaries[1]["base"]
    difference = json.loads((finished / "control.json").read_text())
    for who in ("seen", "unseen"):
        run, control = (s["final"][who]["loss"] for s in summaries)
        told = difference[who]["loss"]
        assert told == {"run": run, "control": control, "difference": run - control}


def test_a_run_never_overwrites_a_folder(finished: Path) -> None:
    before = sorted(finished.rglob("*"))
    again = polyrank("run", finished.parent / "tiny.toml", "--out", finished)
    assert again.code == 1
    assert "exists already" in again.err
    assert f"polyrank resume {finished}" in again.err
    assert sorted(finished.rglob("*")) == before


def test_resuming_a_finished_run_says_so_shows_it_again_and_trains_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    again = polyrank("resume", finished)
    assert again.code == 0
    first, _, rest = again.out.partition("\n")
    assert first == f"{finished}: finished before, nothing was trained"
    assert rest == (finished.parent / "out.txt").read_text()
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before


def test_a_finished_run_goes_on_where_its_recipe_now_asks_for_more_rounds(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    assert polyrank("run", recipe, "--out", whole, "--control", "T1").code == 0
    begun = polyrank("run", recipe, "rounds=1", "--out", longer, "--control", "T1")
    assert begun.code == 0, begun.err
    own = longer / "recipe.toml"
    own.write_text(own.read_text().replace("rounds = 1\n", "rounds = 2\n"))
    done = polyrank("resume", longer)
    assert done.code == 0, done.err
    assert done.err.count("going on after round 1") == 2
    assert "finished before" not in done.out
    for run in ("", "control"):
        assert adapter_bytes(longer / run) == adapter_bytes(whole / run)
        assert json.loads((longer / run / "summary.json").read_text())["rounds"] == 2


def test_json_is_all_there_is_on_stdout(finished: Path) -> None:
    told = json.loads(polyrank("resume", finished, "--json").out)
    summary = json.loads((finished / "summary.json").read_text())
    control = json.loads((finished / "control" / "summary.json").read_text())
    before = {"finished_before": True}
    assert told == {"folder": str(finished), **before, **summary, "control": before | control}


def test_a_control_that_is_trained_beside_a_finished_run_is_told_apart(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "control" / "summary.json").unlink()
    done = polyrank("resume", run)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{run}: finished before, only its control was trained now\n")
    (run / "control" / "summary.json").unlink()
    told = json.loads(polyrank("resume", run, "--json").out)
    assert (told["finished_before"], told["control"]["finished_before"]) == (True, False)


def test_inspect_shows_ranks_rounds_and_where_the_energy_is(finished: Path) -> None:
    done = polyrank("inspect", finished)
    assert done.code == 0, done.err
    assert lines_with(done.out, "T2", "2 at 8 matrices, 6 at 6 matrices")
    assert len(re.findall(r"^    [12]  ", done.out, re.MULTILINE)) == 2
    assert "at the clients' own" in " ".join(done.out.split())
    assert lines_with(done.out, "mlp.down_proj", "█")
    texts = [line for line in done.out.splitlines() if str(finished) not in line]
    assert widest("\n".join(texts)) <= 80


def test_inspect_shows_a_line_for_every_matrix_where_it_is_asked_for(finished: Path) -> None:
    whole = polyrank("inspect", finished, "--sites").out
    table = whole.partition("global adapter")[2]
    assert len(lines_with(table, "_proj", "%")) == 14
    assert widest(table) <= 80


def test_inspect_tells_programs_everything(finished: Path) -> None:
    told = json.loads(polyrank("inspect", finished, "--json").out)
    lines = (finished / "rounds.jsonl").read_text().splitlines()
    assert told["rounds"] == [json.loads(line) for line in lines]
    assert told["fleet"] == json.loads((finished / "fleet.json").read_text())
    assert len(told["sites"]) == 14
    by_site = sum(site["energy"] for site in told["sites"].values())
    for groups in ("blocks", "kinds"):
        assert sum(group["energy"] for group in told[groups].values()) == pytest.approx(by_site)
    own = load_file(finished / "adapter" / "adapter_model.safetensors")
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    a, b = (own[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / a.shape[0]
    s = torch.linalg.svdvals(scale * b @ a)
    assert told["sites"][name]["first"] == pytest.approx(float(s[0]), rel=1e-4)
    assert told["sites"][name]["norm"] == pytest.approx(float(s.norm()), rel=1e-4)


def test_the_spectra_of_a_finished_run_are_those_of_its_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    """What is stored at the end is what is computed for a run that stored nothing."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "spectra.json").unlink()
    stored, computed = (
        json.loads(polyrank("inspect", folder, "--json").out)["sites"]
        for folder in (finished, copy)
    )
    assert stored == computed


def test_a_finished_run_is_inspected_in_full_without_torch(finished: Path) -> None:
    code = (
        "import sys\nfrom polyrank.cli import main\n"
        "try: main(['inspect', sys.argv[1], '--sites'])\n"
        "finally: assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished)], capture_output=True)
    assert done.returncode == 0, done.stderr


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=models.batch()).logits


def test_an_export_at_a_smaller_rank_is_a_smaller_adapter_of_the_same_base(
    finished: Path, tmp_path: Path
) -> None:
    done = polyrank("export", finished, "--rank", 1, tmp_path / "one")
    assert done.code == 0, done.err
    assert re.search(r"rank 1 keeps \d+\.\d+% of the energy", done.out)
    small = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "one")
    full = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter")
    ranks = {tuple(p.shape) for name, p in small.named_parameters() if "lora_A" in name}
    assert {shape[0] for shape in ranks} == {1}
    assert not torch.equal(logits(small), logits(full))


def test_an_export_of_a_run_that_is_not_finished_says_so(finished: Path, tmp_path: Path) -> None:
    assert "not finished" not in polyrank("export", finished, tmp_path / "whole").out
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    done = polyrank("export", tmp_path / "run", tmp_path / "part")
    assert done.code == 0, done.err
    told = f"{tmp_path / 'run'} is not finished: this is its adapter after round 2"
    assert done.out.startswith(told)


def test_an_export_at_a_larger_rank_than_stored_keeps_everything(
    finished: Path, tmp_path: Path
) -> None:
    assert "100.000%" in polyrank("export", finished, tmp_path / "all", "--rank", 99).out
    full = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "all")
    # Refactored in float32: the products agree up to rounding.
    torch.testing.assert_close(logits(again), logits(full), rtol=1e-4, atol=1e-4)


def test_the_merged_export_is_the_base_with_the_adapter(finished: Path, tmp_path: Path) -> None:
    done = polyrank("export", finished, tmp_path / "merged", "--merged")
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter")
    base = AutoModelForCausalLM.from_pretrained(finished.parent / "base")
    # One float32 addition per weight apart.
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(base), rtol=1e-3, atol=1e-3)


def test_rows_that_were_left_out_at_any_stage_are_named_in_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    long = " ".join(["w5"] * 100)
    rows = [
        {"task": "task0", "instruction": "w90", "output": " "},
        {"task": "task0", "instruction": "", "output": "w4"},
        {"task": "tiny", "instruction": "w90", "output": "w4"},
        {"task": "task0", "instruction": long, "output": "w4"},
    ]
    with (tmp_path / "tasks.jsonl").open("a") as file:
        file.writelines(json.dumps({"unseen": False, **row}) + "\n" for row in rows)
    done = polyrank("run", recipe, "rounds=1", "data.min_examples=2", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert told == {
        "count": 4,
        "rows": {
            "no completion": ["row 60"],
            "empty prompt": ["row 61"],
            "client below 2 examples": ["tiny row 62"],
            "too long": ["task0 row 63"],
        },
    }
    assert "not used: 1 no completion, 1 empty prompt, 1 client below 2 examples" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", "RUN", "BASE"], 1, "exists already"),
        (["export", "RUN", "new", "--rank", "0"], 2, "--rank"),
        (["export", "RUN", "new", "--rank", "2", "--merged"], 2, "not both"),
        (["export", "BASE", "new"], 1, "expected a folder that `polyrank run` made"),
        (["resume", "BASE"], 1, "expected a folder that `polyrank run` made"),
        (["resume", "nowhere"], 1, "nowhere: no such run folder"),
        (["inspect", "nowhere"], 1, "nowhere: expected a run folder"),
        (["inspect", "BASE"], 1, "expected a run folder with a run.json in it"),
        (["run"], 2, "RECIPE"),
        (["walk"], 2, "walk"),
    ],
)
def test_wrong_usage_is_told_and_has_its_exit_code(
    finished: Path, arguments: list[str], code: int, said: str
) -> None:
    places = {"RUN": finished, "BASE": finished.parent / "base"}
    done = polyrank(*(places.get(argument, argument) for argument in arguments))
    assert done.code == code
    assert said in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("local.lrr=1", "did you mean local.lr?"),
        ("model.source=/nowhere", "/nowhere"),
        ("data.source=nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        ("data.by=colour", "colour"),
        ("data.max_length=65", "more than the context"),
        ("data.max_length=2", "no client has a usable training example"),
        ("model.sites=zebra", "'zebra' matches no"),
        ("fleet.types={T1 = 0, T2 = 1}", "rank 0"),
        ("fleet.types={T1 = 17, T2 = 1}", "rank 17"),
        ("fleet.types={T1 = {zebra = 1}, T2 = 1}", "['zebra'] match no site"),
        ("fleet.clients={task0 = 'T1'}", "no LoRA type for the clients"),
        ("fleet.clients={zebra = 'T1'}", "['zebra'] are no training clients"),
        ("aggregation.rule=fedit", "rank"),
    ],
)
def test_what_can_be_foreseen_fails_before_a_run_folder_is_made(
    finished: Path, tmp_path: Path, override: str, said: str
) -> None:
    done = polyrank("run", finished.parent / "tiny.toml", override, "--out", tmp_path / "run")
    assert done.code == 1
    assert said in done.err
    assert done.err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_an_unwritable_place_is_an_error_and_no_traceback(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = polyrank("run", finished.parent / "tiny.toml", "--out", tmp_path / "file" / "run")
    assert done.code == 1
    assert "error: " in done.err


def test_without_out_runs_are_numbered(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["rounds=1", "local.steps=1", "evaluation.generate=0", "name=short"]
    for folder in ("short", "short-2"):
        done = polyrank("run", finished.parent / "tiny.toml", *fast, "--json")
        assert json.loads(done.out)["folder"] == f"runs/{folder}"
        assert "control" not in json.loads(done.out)
        assert json.loads(done.out)["finished_before"] is False


def test_ctrl_c_saves_and_resume_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """One SIGINT to a process in training; the run goes on in another process."""
    recipe, long = finished.parent / "tiny.toml", ["rounds=4", "local.steps=40", "control=T1"]
    running = process(tmp_path, "run", recipe, *long, "--out", "cut")
    assert running.stderr is not None
    said = ""
    for line in running.stderr:
        said += line
        if line.startswith("    1  "):
            running.send_signal(signal.SIGINT)
            break
    out, rest = running.communicate(timeout=120)
    assert running.returncode == 130, said + rest
    assert out == ""
    assert "go on with: polyrank resume cut" in rest
    assert not (tmp_path / "cut" / "summary.json").exists()

    resumed = command(tmp_path, "resume", "cut", "--json")
    assert resumed.code == 0, resumed.err
    whole = polyrank("run", recipe, *long, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.err
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    cut, whole_summary = (
        json.loads(resumed.out),
        json.loads((tmp_path / "whole" / "summary.json").read_text()),
    )
    assert {k: cut[k] for k in ("rounds", "base", "final", "bytes_up")} == {
        k: whole_summary[k] for k in ("rounds", "base", "final", "bytes_up")
    }
    for part in ("control/adapter/adapter_model.safetensors", "recipe.toml", "fleet.json"):
        assert (tmp_path / "cut" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()
