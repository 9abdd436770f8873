"""The wheel alone, without the repository and without optional packages, runs what it promises."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = (
    "rounds=2",
    "control=",
    "sampling.number=2",
    "local.steps=2",
    "evaluation.examples=1",
    "evaluation.generate=1",
)
TASKS = "".join(
    json.dumps({"task": task, "instruction": "Say it.", "input": f"{i}", "output": f"{task}"})
    + "\n"
    for task in ("one", "two", "three")
    for i in range(12)
)


def commands(folder: Path, *changes: str) -> list[list[str]]:
    """Return what a newcomer types, in order; every command must end with exit code 0."""
    (folder / "tasks.jsonl").write_text(TASKS, encoding="utf-8")
    own = ("data.source=tasks.jsonl", "data.clients=6", "data.unseen=2", "rounds=1")
    drawn = ("data.by=dirichlet", "data.on=task", "data.alpha=5")
    few = ("rounds=1", *changes[1:])
    return [
        ["--version"],
        ["check", "quickstart"],
        ["run", "quickstart", *changes, "--out", "run"],
        ["inspect", "run"],
        ["export", "run", "small", "--rank", "2"],
        ["run", "quickstart", *changes, *own, "data.by=iid", "--out", "evenly"],
        ["run", "quickstart", *changes, *own, *drawn, "--out", "drawn"],
        ["init", "mine.toml", "--data", "tasks.jsonl", "--clients", "4"],
        ["run", "mine.toml", *few, "--out", "mine"],
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def required(name: str, known: set[str]) -> set[str]:
    """Return a distribution's name, and those of all that it needs without extras."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in known:
        return known
    known.add(name)
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # Not for this platform or version of Python.
        return known
    for line in lines:
        if "extra ==" not in line:
            required(re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0], known)
    return known


HIDE = '''
import importlib.machinery, os, sys

class Visible(importlib.machinery.PathFinder):
    """Finds what Python finds, without the packages that the core does not need."""

    hidden = frozenset(os.environ["HIDDEN_PACKAGES"].split())

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Visible
'''

DRIVE = """
import json, sys
from polyrank.cli import main

for command in json.loads(sys.argv[1]):
    print("$ polyrank", *command, flush=True)
    try:
        main(command)
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{command}: {ended.code}")
"""


def test_the_core_dependencies_are_enough(wheel: Path, tmp_path: Path) -> None:
    """In one process, with every package hidden that `pip install polyrank` would not bring."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    (info,) = (tmp_path / "site").glob("polyrank-*.dist-info/METADATA")
    needs = metadata.PathDistribution(info.parent).requires or []
    core: set[str] = {"polyrank"}
    for line in needs:
        if "extra ==" not in line:
            required(re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0], core)
    hidden = {
        package
        for package, names in metadata.packages_distributions().items()
        if not core & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    }
    assert {"datasets", "flwr", "flwr_datasets", "grpc", "sacrebleu", "matplotlib"} <= hidden
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "HIDDEN_PACKAGES": " ".join(sorted(hidden)),
    }
    given = [sys.executable, "-c", DRIVE, json.dumps(commands(tmp_path, *SHORT))]
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["final"]["seen"]["rouge_l"] is not None
    assert (tmp_path / "small" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_new_environment_with_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """As a newcomer does it: a virtual environment, pip install, and commands; needs a network."""
    here = tmp_path / "venv" / "bin"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments: str | Path) -> str:
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    call(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = (here / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    call(*pip, "torch")  # First, so that it comes in the build that was asked for.
    call(*pip, wheel)
    listed = call(here / "python", "-m", "pip", "list", "--format=freeze")
    assert not re.search(r"^(datasets|flwr|flwr-datasets|grpcio|sacrebleu)==", listed, re.M)
    for command in commands(tmp_path, "rounds=2"):
        call(here / "polyrank", *command)
    assert "polyrank" in call(here / "python", "-m", "polyrank", "--help")
    loaded = "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('small')"
    call(here / "python", "-c", loaded)
