"""Does the quickstart's unequal fleet beat its control, on every seed and on another machine?

    python benchmarks/quickstart.py                         # seeds 0 to 4, about seven minutes
    python benchmarks/quickstart.py --seeds 0 --rates 5e-3  # the control at one more rate
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \\
        python benchmarks/quickstart.py --label old-cpu     # as on a much older processor
    python benchmarks/quickstart.py --table benchmarks/results/quickstart.jsonl

Every seed is one ``polyrank run quickstart seed=S``, in a process of its own, with the control that
the recipe has: all clients at the weakest type, on the same clients, data, seeds, rounds and steps.
With ``--rates`` the control is also run at other learning rates, since the rate that suits rank 1
may not be the recipe's. Rates and rounds of the recipe were chosen on seeds from 100 on.

Every run is added as a line of JSON to ``--out``. Printed is a table in Markdown: exact match
before, after, and of the controls, on the test parts of training and of held-out clients.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GROUPS = {"seen": "training", "unseen": "held-out"}
SCORES = ("loss", "exact_match", "rouge_l")


def main() -> None:
    given = arguments()
    if given.table:
        lines = given.table.read_text(encoding="utf-8").splitlines()
        print(table([json.loads(line) for line in lines]))
        return
    rows = []
    for seed in given.seeds:
        rows.append(measured(seed, given.label, given.rates))
        print(json.dumps(rows[-1]), file=sys.stderr)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", nargs="*", default=[], help="more rates for the control")
    parser.add_argument("--label", default="here", help="what the rows call this machine")
    parser.add_argument("--out", type=Path, help="file of JSON lines to add the rows to")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    return parser.parse_args()


def measured(seed: int, label: str, rates: list[str]) -> dict[str, Any]:
    """Return the scores of one seed's run and of its controls."""
    import torch

    summary = run(f"seed={seed}")
    controls = {"as the recipe": summary["control"]}
    for rate in rates:
        controls[rate] = run(f"seed={seed}", "control=", "fleet.force=weakest", f"local.lr={rate}")
    return {
        "seed": seed,
        "label": label,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "seconds": round(summary["seconds"] + summary["control"]["seconds"]),
        "before": scores(summary["base"]),
        "after": scores(summary["final"]),
        "control": {name: scores(control["final"]) for name, control in controls.items()},
    }


def run(*changes: str) -> dict[str, Any]:
    """Carry out the quickstart and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["run", "quickstart", *changes, "--json", "--out", f"{folder}/run"]
        done = subprocess.run(
            [sys.executable, "-c", "from polyrank.cli import main; main()", *command],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def scores(evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {who: {score: evaluation[who][score] for score in SCORES} for who in GROUPS}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of exact match, and the least lead over the best control."""
    names = list(dict.fromkeys(name for row in rows for name in row["control"]))
    heads = ["machine", "seed", "clients", "before", "after", *(f"control, {n}" for n in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * 3 + "|---:" * (len(heads) - 3) + "|"]
    leads = []
    for row in rows:
        for who, group in GROUPS.items():
            after = row["after"][who]["exact_match"]
            controls = {name: own[who]["exact_match"] for name, own in row["control"].items()}
            leads.append(after - max(controls.values()))
            values = [row["before"][who]["exact_match"], after]
            cells = [row["label"], str(row["seed"]), group, *(f"{v:.3f}" for v in values)]
            cells += [f"{controls[n]:.3f}" if n in controls else "" for n in names]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\nleast lead over the best control: {min(leads):+.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
