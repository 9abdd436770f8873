"""A deployment on one machine, in about three minutes: `make deploy-demo`.

A SuperLink with TLS and SuperNode authentication, three SuperNodes of unequal budgets, one of them
split, three rounds of FlexLoRA on the embedded miniature: real processes that talk over the
loopback interface. docs/how-to/deployment.md does the same on several machines. Nothing is
left running afterwards, nor after Ctrl-C; keys and the SuperLink's database are thrown away.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

from machines import Site

HERE = Path(__file__).parent
CLIENTS = {
    "hospital-a": ("things", "largest_rank = 16"),
    "hospital-b": ("words", "largest_rank = 8"),
    "clinic-c": ("rows", "largest_rank = 4\nlowest_cut = 2"),
}
"""Every client's category of the embedded tasks, and what it consents to."""
CLIENT_TOML = """\
name = "{name}"

[data]
source = "data.jsonl"

[limits]
{limits}
"""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FLOWERS_OWN = re.compile(r"(INFO|DEBUG) *:|Using SuperLink")
LONGEST = 600.0
"""Seconds after which a run that has not ended is given up."""


def main() -> int:
    """Play it; return the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, help="the run's folder; default: a new one in runs/")
    from polyrank.run.folder import unused

    out = unused(arguments.parse_args().out or Path("runs/deploy-demo")).resolve()
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="polyrank-demo-") as folder:
            completed = play(Path(folder) / "site", out)
    except KeyboardInterrupt:
        print("\nstopped; nothing is left running", flush=True)
        return 130
    if not completed:
        return 1
    show(out)
    print(f"\n{time.monotonic() - began:.0f} s in all; no process is left running")
    return 0


def play(folder: Path, out: Path) -> bool:
    """Set the machines up, run the recipe, and stop everything; return whether it went well."""
    from polyrank.config import read
    from polyrank.flower.app_folder import write_app

    say("a certificate for the server, and a SuperLink that demands SuperNodes' keys")
    with Site(folder) as site:
        say(f"SuperLink at {site.address}, process {site.superlink.pid}")
        write_app(read(HERE / "recipe.toml"), folder / "app")
        for name, (category, limits) in CLIENTS.items():
            client = write_client(folder / name, name, category, limits)
            node = site.start_node(name, client)
            consents = limits.replace("\n", ", ")
            say(f"{name}: key registered, SuperNode is process {node.pid}; {consents}")
        run = site.run(folder / "app", {"app.out": str(out), "app.wait": 120.0})
        say(f"flwr run: run {run}; from here on it is the server that speaks (flwr log)")
        for line in site.follow(run):
            plain = COLOURS.sub("", line).rstrip()
            if plain and not FLOWERS_OWN.match(plain):
                print(f"  {plain}", flush=True)
        status = site.wait(run, LONGEST)
        say(f"Flower says {status.word}")
        if not status.completed:
            print(f"{status.details}\n{site.logs()}", file=sys.stderr)
        return status.completed


def write_client(folder: Path, name: str, category: str, limits: str) -> Path:
    """Write a client's data and its client.toml into a folder; return the latter."""
    from polyrank.sample import TASKS

    folder.mkdir()
    rows = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
    own = [json.dumps(row) for row in rows if row["category"] == category and not row["unseen"]]
    (folder / "data.jsonl").write_text("".join(f"{row}\n" for row in own), encoding="utf-8")
    file = folder / "client.toml"
    file.write_text(CLIENT_TOML.format(name=name, limits=limits), encoding="utf-8")
    return file


def show(out: Path) -> None:
    """Show what has arrived at the server: the adapter, and what each client did."""
    from peft import AutoPeftModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)

    adapter = out / "adapter"
    say(f"the adapter has arrived in {adapter}")
    for file in sorted(adapter.iterdir()):
        print(f"  {file.stat().st_size:>9} bytes  {file.name}")
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    config = model.peft_config["default"]
    sites = ", ".join(sorted(config.target_modules))
    print(f"  peft loads it: {type(model).__name__}, rank {config.r}, at {sites}")
    say("each client, from summary.json")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    table(summary["clients"])


def table(clients: dict[str, dict[str, object]]) -> None:
    """Print what is told of each client, a line each."""
    columns = ["rounds_joined", "bytes_up", "bytes_down", "refused", "late"]
    print("  " + f"{'client':<12}" + "".join(f"{name:>15}" for name in columns))
    for client, told in sorted(clients.items()):
        print(f"  {client:<12}" + "".join(f"{told.get(name, ''):>15}" for name in columns))


def say(line: str) -> None:
    """Say what is being done."""
    print(f"* {line}", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
