"""What the README says is run: its Python block, its commands and its tree."""

import re
import shlex
from pathlib import Path

import pytest

import models
import polyrank
from polyrank.config.reading import SHIPPED
from polyrank.model import LoadedModel, load_model
from runs import write_tasks

ROOT = Path(__file__).parents[2]
TAKE_RECIPES = ("run", "plan", "compare", "app")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def test_the_python_of_the_readme_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's model is replaced by a random one that is wide enough for the paper's ranks."""
    (code,) = blocks("python")
    sizes = {"hidden_size": 208, "intermediate_size": 208, "num_hidden_layers": 1}
    models.write_tiny(tmp_path / "base", num_key_value_heads=4, **sizes)
    write_tasks(tmp_path / "tasks.jsonl", tasks=30)

    def local(source: str) -> LoadedModel:
        assert source.count("/") == 1
        return load_model(tmp_path / "base", device="cpu")

    monkeypatch.setattr(polyrank, "load_model", local, raising=False)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 20
    assert all(line.startswith(f"round {i}") for i, line in enumerate(printed, start=1))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_commands_of_the_readme_are_commands(tmp_path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    words = [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line]
    made = {line[1] for line in words if line[0] == "make"}
    assert {"quickstart", "test"} <= made <= set(targets)
    ours = {line[1] for line in words if line[0].endswith("polyrank")}
    assert {"run", "resume", "export", "inspect"} <= ours
    recipes = {
        line[2] for line in words if line[0].endswith("polyrank") and line[1] in TAKE_RECIPES
    }
    assert {"quickstart", "split", "e2e", "across-machines"} <= recipes <= set(SHIPPED)


def test_the_tree_of_the_readme_names_every_package_and_module() -> None:
    tree = next(block for block in blocks("") if "src/polyrank/" in block)
    source = ROOT / "src" / "polyrank"
    parts = {path.name for path in source.iterdir() if path.suffix == ".py"}
    parts |= {f"{path.name}/" for path in source.iterdir() if (path / "__init__.py").exists()}
    for part in sorted(parts - {"__init__.py"}):
        assert part in tree, part
