"""Runs that `kill_driver.py` kills or whose disk is full, each resumed to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path


def driven(how: str, moments: int, root: Path, setting: str = "whole") -> dict:
    """Return what the driver tells of its runs; see there."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, str(tests / "kill_driver.py")]
    done = subprocess.run(
        [*driver, how, str(root), str(moments), "0", setting],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stderr}
