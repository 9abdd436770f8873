"""docs/how-to/extending.md runs as it stands, on a small model: Python, recipe, resume, app."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

import models
import polyrank
from polyrank.config.app import app_settings
from polyrank.config.flower import from_run_config
from polyrank.errors import RecipeError
from polyrank.model import load_model
from runs import adapter_bytes, command, write_recipe, write_tasks

PAGE = (Path(__file__).parents[2] / "docs/how-to/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(.*?)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(MODULE,) = [text for name, text in BLOCKS if name.startswith("python title=")]
(PYTHON,) = [text for name, text in BLOCKS if name == "python"]
RECIPE_LINES, APP_LINES = [text.splitlines() for name, text in BLOCKS if name == "sh"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path)
    (tmp_path / "my_rules.py").write_text(MODULE, encoding="utf-8")
    return tmp_path


def ran(folder: Path, line: str, *without: str):
    """Run a line of the page on the small recipe, some of its words left out."""
    words = ["tiny.toml" if word == "quickstart" else word for word in shlex.split(line)]
    assert words[0] == "polyrank"
    return command(folder, *(word for word in words[1:] if word not in without))


def test_the_commands_run_inspect_resume_and_export_and_are_refused_without_the_flag(folder):
    run, inspect, resume, export = RECIPE_LINES
    refused = ran(folder, run, "--allow-code")
    assert refused.code == 1
    assert "--allow-code" in refused.err
    assert not (folder / "runs").exists()
    assert not (folder / "__pycache__").exists(), "nothing was imported"

    begun = ran(folder, run.replace("rounds=2", "rounds=1"))
    assert begun.code == 0, begun.err
    own = folder / "runs" / "own"
    assert (own / "my_rules.py").read_text(encoding="utf-8") == MODULE
    assert json.loads((own / "run.json").read_text())["rule_class"] == "my_rules:SlowServer"

    # What goes on is the copy, whatever becomes of the file; and the same bytes as in one go.
    (folder / "my_rules.py").write_text("raise SystemExit\n", encoding="utf-8")
    text = (own / "recipe.toml").read_text(encoding="utf-8")
    (own / "recipe.toml").write_text(text.replace("rounds = 1", "rounds = 2"), encoding="utf-8")
    assert ran(folder, inspect).code == 0, "nothing of the rule is run"
    for line in (resume, export):
        refused = ran(folder, line, "--allow-code")
        assert refused.code == 1, line
        assert "--allow-code" in refused.err
        done = ran(folder, line)
        assert done.code == 0, done.err
    (folder / "my_rules.py").write_text(MODULE, encoding="utf-8")
    whole = ran(folder, run.replace("runs/own", "runs/whole"))
    assert whole.code == 0, whole.err
    assert adapter_bytes(folder / "runs" / "whole") == adapter_bytes(own)


def test_the_python_of_the_page_runs(folder, monkeypatch, capsys):
    sizes = {"hidden_size": 208, "intermediate_size": 208, "num_hidden_layers": 1}
    sizes |= {"max_position_embeddings": 128}  # room for generated answers
    models.write_tiny(folder / "wide", num_key_value_heads=4, **sizes)
    write_tasks(folder / "tasks.jsonl", tasks=30)
    monkeypatch.setattr(
        polyrank, "load_model", lambda _: load_model(folder / "wide", device="cpu"), raising=False
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    exec(PYTHON, {})
    del sys.modules["my_rules"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (folder / "out" / "adapter_config.json").is_file()


def test_an_app_is_made_only_with_the_servers_folder_and_its_clients_import_nothing(folder):
    (line,) = APP_LINES
    code = folder / "code"
    code.mkdir()
    (folder / "my_rules.py").rename(code / "my_rules.py")
    refused = ran(folder, line, "app.allow-code=/srv/rules")
    assert refused.code == 1
    assert "app.allow-code" in refused.err
    made = ran(folder, line.replace("/srv/rules", str(code)))
    assert made.code == 0, made.err

    config = folder / "own-app" / "pyproject.toml"
    flat = _flat(tomllib.loads(config.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])
    assert app_settings(flat).allow_code == str(code)
    recipe = from_run_config(flat, at_server=False)
    assert recipe.aggregation.rule == "my_rules:SlowServer"
    assert "my_rules" not in sys.modules
    with pytest.raises(RecipeError, match="nothing of it was run"):
        from_run_config(flat)


def _flat(content, prefix=""):
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
