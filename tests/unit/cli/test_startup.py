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


@pytest.mark.parametrize("run", ["stopped", "finished"])
def test_a_run_is_inspected_without_anything_heavy(tmp_path: Path, run: str) -> None:
    done = watched(tmp_path, "inspect", str(FIXTURE / run))
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj" in done.stdout


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_folder_without_a_run_is_an_error_at_once(tmp_path: Path, command: str) -> None:
    done = watched(tmp_path, command, "nowhere", *(["out"] if command == "export" else []))
    assert done.returncode == 1, done.stderr
    assert "nowhere" in done.stderr
