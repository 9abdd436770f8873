"""Small recipes on tiny models for tests of whole runs.

recipe = write_recipe(tmp_path)                 # a TOML file with model and data beside it
polyrank("run", recipe, "rounds=1")             # -> Finished(code, out, err), in this process
command(tmp_path, "run", recipe)                # the same in a process of its own
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import models
from polyrank import cli

RECIPE = """\
name = "tiny"
rounds = 2

[model]
source = "base"
device = "cpu"

[data]
source = "tasks.jsonl"
template = "{prompt} {input}"

[fleet]
types = {T1 = 1, T2 = {attention = 2, feed-forward = 6}}
distribution = {T1 = 0.5, T2 = 0.5}

[local]
lr = 1e-2
steps = 2
batch = 4

[sampling]
fraction = 0.5

[evaluation]
generate = 1
examples = 2
max_new_tokens = 2

[engine]
threads = 1
"""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_tasks(path: Path, tasks: int = 6, rows: int = 10) -> Path:
    """Write tasks that repeat a word: four of six seen, in two categories."""
    lines = []
    for task in range(tasks):
        for row in range(rows):
            word = f"w{4 + (7 * task + row) % 80}"
            line = {"task": f"task{task}", "category": f"kind{task % 2}", "unseen": task >= 4}
            lines.append(line | {"instruction": f"w{90 + task}", "input": word, "output": word})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """Write a recipe with a tiny model and tasks beside it; return the recipe."""
    models.write_tiny(folder / "base")
    write_tasks(folder / "tasks.jsonl")
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def polyrank(*arguments: object) -> Finished:
    """Run the command line in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def process(folder: Path, *arguments: object) -> "subprocess.Popen[str]":
    """Start the command line in a process of its own, in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "polyrank", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )


def command(folder: Path, *arguments: object) -> Finished:
    """Run the command line in a process of its own, in a folder, to its end."""
    started = process(folder, *arguments)
    out, err = started.communicate(timeout=300)
    return Finished(started.returncode, out, err)


def adapter_bytes(run: Path) -> dict[str, bytes]:
    """Return the files of a run's adapter."""
    return {file.name: file.read_bytes() for file in sorted((run / "adapter").iterdir())}


def widest(text: str) -> int:
    """Return the length of the longest line."""
    return max(map(len, text.splitlines()), default=0)


def lines_with(text: str, *parts: str) -> Sequence[str]:
    """Return the lines that hold all the parts."""
    return [line for line in text.splitlines() if all(part in line for part in parts)]
