"""The picture of a run in README.md, made from a real run: `make picture`, two to five minutes.

    python examples/picture.py > docs/assets/quickstart.svg

Runs `polyrank run quickstart` in a temporary folder and draws what it prints on stdout, whole, as
an SVG without fonts or scripts of other hosts.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH = 80
COMMAND = ("run", "quickstart")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        printed = subprocess.run(
            [Path(sys.executable).parent / "polyrank", *COMMAND],
            cwd=folder,
            env={**os.environ, "COLUMNS": str(WIDTH), "FORCE_COLOR": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    print(drawn(printed), end="")


def drawn(printed: str) -> str:
    """Return an SVG of a terminal with this text."""
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(printed.rstrip()))
    own_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    title = f"polyrank {' '.join(COMMAND)}"
    return console.export_svg(title=title, code_format=own_fonts, unique_id="polyrank")


if __name__ == "__main__":
    main()
