"""How long the command line takes before it answers, in processor seconds.

    python benchmarks/startup.py [--source FOLDER] [--repeats 5] [--quick]

Makes a Llama of 30 blocks (210 adapted matrices, random weights) and a run of two rounds with it,
then measures processes of their own: import, help, errors of a recipe, `inspect`, `plan` and a
whole first round. Each figure is the median of user and system seconds of the process. `--source`
is the `src` folder of another version to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from polyrank.sample import MODEL

MAIN = "from polyrank.cli import main; main()"

RECIPE = """
rounds = 2
[model]
source = "model"
device = "cpu"
[data]
source = "rows.jsonl"
[fleet]
types = {small = 2, large = 8}
distribution = {small = 0.5, large = 0.5}
[local]
steps = 1
batch = 2
[evaluation]
examples = 2
generate = 0
[engine]
threads = 1
"""

PLAN = """
[devices.laptop]
memory = "200 MiB"
[plan]
"""


def make(folder: Path, blocks: int) -> None:
    """Write a model, rows, a recipe with types and one with a plan."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=blocks)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    rows = [
        {"task": f"task-{i % 4}", "instruction": "say it again", "input": f"{i}", "output": f"{i}"}
        for i in range(40)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    types = RECIPE[RECIPE.index("[fleet]") : RECIPE.index("[local]")]
    planned = RECIPE.replace(types, "[fleet]\ndistribution = {laptop = 1.0}\n") + PLAN
    (folder / "plan.toml").write_text(planned, encoding="utf-8")


def seconds(folder: Path, code: str, arguments: Sequence[str], source: Path | None) -> float:
    """Return the processor seconds of a Python process."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,  # Errors of recipes end with 1.
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="the src folder of another version")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    options = parser.parse_args()
    repeats, blocks = (1, 2) if options.quick else (options.repeats, 30)
    source = None if options.source is None else options.source.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, blocks)
        seconds(folder, MAIN, ["run", "recipe.toml", "--out", "run"], source)
        if not (folder / "run" / "summary.json").is_file():
            raise SystemExit("the run that is to be inspected failed")
        rows = {
            "import polyrank": ("import polyrank", []),
            "polyrank --help": (MAIN, ["--help"]),
            "an unknown key": (MAIN, ["run", "recipe.toml", "local.lrr=1"]),
            "an impossible value": (MAIN, ["run", "recipe.toml", "local.lr=-1"]),
            "an option that the rule lacks": (MAIN, ["run", "recipe.toml", "aggregation.gamma=1"]),
            "plan without devices": (MAIN, ["plan", "recipe.toml"]),
            "inspect": (MAIN, ["inspect", "run"]),
            "inspect --sites": (MAIN, ["inspect", "run", "--sites"]),
            "plan": (MAIN, ["plan", "plan.toml"]),
        }
        print(f"{7 * blocks} matrices, processor seconds, median of {repeats}\n")
        print("| | s |\n|---|---:|")
        for label, (code, arguments) in rows.items():
            taken = [seconds(folder, code, arguments, source) for _ in range(repeats)]
            print(f"| {label} | {statistics.median(taken):.2f} |", flush=True)
        first = ["run", "recipe.toml", "rounds=1", "--out"]
        taken = [seconds(folder, MAIN, [*first, f"first-{i}"], source) for i in range(repeats)]
        print(f"| run of one round, evaluated before and after | {statistics.median(taken):.2f} |")


if __name__ == "__main__":
    main()
