"""Pages of the documentation as programs: their shell and Python blocks, run in order.

for block in blocks(page): run(block, folder)       # -> what it printed
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of a page: its language and its text, as they stand."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that are run; blocks of other languages show something."""
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def run(block: Block, folder: Path) -> str:
    """Run a block in a folder, with this environment's commands first; return what it printed."""
    commands = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-"]}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        commands[block.language],
        input=block.text,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}"
    return done.stdout


def checkout(folder: Path) -> Path:
    """Make a folder as a checkout is after `make check`, with this environment; return it."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "src", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".ready").touch()
    return folder
