"""What answers at once: help, errors of recipes, and a look at a run import no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_folder_0_1"

WATCHED = """
import sys
from polyrank.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy"} & {*sys.modules}
    if heavy:
        print(f"imported {sorted(heavy)}", file=sys.stderr)
        raise SystemExit(99)
"""

RECIPE = """
[model]
source = "sample"
[data]
source = "sample"
[fleet]
types = {T1 = 4}
distribution = {T1 = 1.0}
"""


def watched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that ends with 99 if it imported something heavy."""
    command = [sys.executable, "-c", WATCHED, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *(
            [name, "--help"]
            for name in ("run", "check", "plan", "compare", "resume", "inspect", "export", "app")
        ),
        ["profile", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    done = watched(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "polyrank" in done.stdout


@pytest.mark.parametrize("command", ["run", "check", "plan", "compare", "app"])
def test_every_command_tells_an_unknown_key_at_once(tmp_path: Path, command: str) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    folder = ["app-folder"] if command == "app" else []
    done = watched(tmp_path, command, "recipe.toml", *folder, "local.lrr=1")
    assert done.returncode == 1, done.stderr
    assert "did you mean local.lr?" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rounds=0", "rounds: expected at least 1"),
        ("local.lr='fast'", "local.lr: expected a number"),
        ("aggregation.rule=flexlore", "flexlora"),
        ("aggregation.gamma=0.5", "has no option 'gamma'"),
        ("local.sparse_rounds=10", "would be sparse"),
        ("fleet.types={T1 = 0}", "rank 0"),
        ("sampling.fraction=2", "sampling.fraction"),
        ("plan.cuts=some", "plan.cuts"),
        ("split.wire=int9", "split.wire"),
        ("evaluation.every=-1", "evaluation.every"),
        ("early_stopping.patience=0", "early_stopping.patience"),
        ("baseline=hsplitlora", "describe them"),
    ],
)
def test_an_impossible_recipe_is_an_error_at_once(tmp_path: Path, change: str, said: str) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = watched(tmp_path, "run", "recipe.toml", change)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("rounds = ", "not valid TOML"),
        ("[model]", "model.source: missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_at_once(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "recipe.toml").write_text(content)
    done = watched(tmp_path, "run", "recipe.toml")
    assert done.returncode == 1, done.stderr
    assert said in done.stderr


def test_a_recipe_without_devices_has_nothing_to_plan_and_is_told_so_at_once(
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = watched(tmp_path, "plan", "recipe.toml")
    assert done.returncode == 1, done.stderr
    assert "there is nothing to plan" in done.stderr


@pytest.mark.parametrize("run", ["stopped", "finished"])
def test_a_run_is_inspected_without_anything_heavy(tmp_path: Path, run: str) -> None:
    done = watched(tmp_path, "inspect", str(FIXTURE / run))
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj" in done.stdout


@pytest.mark.parametrize("command", ["inspect", "resume", "export"])
def test_a_folder_without_a_run_is_an_error_at_once(tmp_path: Path, command: str) -> None:
    done = watched(tmp_path, command, "nowhere", *(["out"] if command == "export" else []))
    assert done.returncode == 1, done.stderr
    assert "nowhere" in done.stderr
