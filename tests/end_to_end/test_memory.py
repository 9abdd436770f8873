"""Memory does not depend on how many clients there are, nor on how many rounds were run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from models import VOCABULARY

DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from federations import LOCAL, TYPES
from models import tiny_loaded
import polyrank as pr
from polyrank.data import spool

path, kept, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spool.KEPT = kept

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

model = tiny_loaded("llama", num_hidden_layers=1, sites=("q_proj",), max_position_embeddings=512)
clients = pr.partition(pr.load_tasks(path))
fleet = pr.Fleet.sample(clients.seen, {"small": 0.5, "large": 0.5}, types=TYPES, seed=0)
run_settings = pr.RunSettings(
    sampling=pr.Sampling(number=4),
    encoding=pr.Encoding(too_long="cut-prompt"),
    evaluation=pr.Evaluation(every=1, examples=1, clients=4, final_clients=4),
    cohort=2,
)
local = pr.LocalTraining(epochs=None, steps=1, batch=2)
resident = []
with pr.Federation(model, clients, fleet, local=local, settings=run_settings).open() as run:
    for record in run.rounds(rounds):
        resident.append(status("VmRSS"))
    run.finish()
print([status("VmHWM"), resident])
"""

PLENTY = 1 << 40
"""Bytes that wait in memory to be written: with so many nothing is ever written."""


def write(path: Path, clients: int) -> int:
    """Write ten rows of 8 KiB for each client; return the file's size."""
    draw = random.Random(0)
    with path.open("w") as file:
        for client in range(clients):
            for _ in range(10):
                words = draw.choices(range(4, VOCABULARY), k=20)
                text = " ".join(f"w{word}" for word in words)
                row = {"task": f"t{client:04}", "input": f"{text} " * 100, "output": "w5 w6"}
                file.write(json.dumps(row) + "\n")
    return path.stat().st_size


def measure(path: Path, *, kept: int = 1 << 20, rounds: int = 2) -> tuple[int, list[int]]:
    """Return the peak, and the resident bytes after every round, of a run in another process."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path), str(kept), str(rounds)],
        env=os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    peak, resident = json.loads(done.stdout.splitlines()[-1])
    return peak, resident


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_peak_hardly_grows_with_the_clients_and_would_if_all_were_kept_in_memory(tmp_path):
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    added = write(many, 300) - write(few, 30)
    base, _ = measure(few)
    grown = measure(many)[0] - base
    kept = measure(many, kept=PLENTY)[0] - base
    # Of the data itself nothing should stay: what grows is a few dozen bytes an example, some
    # hundred a client, and what the allocator leaves unused.
    assert grown < added / 4, f"{grown / 2**20:.1f} MiB more for {added / 2**20:.1f} MiB of data"
    assert kept > added, f"only {kept / 2**20:.1f} MiB: the bound would prove nothing"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_what_is_resident_after_a_round_does_not_grow_with_the_rounds(tmp_path):
    write(tmp_path / "tasks.jsonl", 30)
    _, resident = measure(tmp_path / "tasks.jsonl", rounds=24)
    grown = resident[23] - resident[7]
    assert grown < 2**20, f"{grown / 2**10:.0f} KiB in 16 rounds: {resident}"
