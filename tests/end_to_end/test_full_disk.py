"""A disk that takes no more, for real: files may not grow beyond a limit of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = """
import json, resource, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import federations
from polyrank.errors import ResourceError

root, model = Path(sys.argv[1]), federations.one_block()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def play(folder, resume=False):
    with federations.opened(folder, model=model, resume=resume) as parts:
        rounds = [record.round for record in parts.rounds(3)]
        parts.finish()
    return rounds

def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes().hex()

play(root / "whole")
expected = weights(root / "whole")
told = []
for size in map(int, sys.argv[2:]):
    folder, error = root / str(size), None
    limit(size)
    try:
        play(folder)
    except ResourceError as caught:
        error = str(caught)
    limit(hard)
    begun = folder.exists()
    lines = len((folder / "rounds.jsonl").read_bytes().splitlines()) if begun else 0
    rounds = play(folder, resume=begun)
    told.append([size, error, begun, lines, rounds, weights(folder) == expected])

# The same federation goes on once there is room.
with federations.opened(root / "again", model=model) as parts:
    limit(int(sys.argv[-1]))
    try:
        list(parts.rounds(3))
    except ResourceError:
        stuck = parts.round
    limit(hard)
    list(parts.rounds(3))
    parts.finish()
print(json.dumps({"told": told, "stuck": stuck, "same": weights(root / "again") == expected}))
"""


def test_a_full_disk_is_said_loses_nothing_and_the_run_goes_on_once_there_is_room(tmp_path):
    # Limits at which the state, the base's evaluation, or the growing rounds.jsonl do not fit.
    sizes = ["600", "2000", "2750", "3000", "5000"]
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), *sizes],
        env=os.environ | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    reached = set()
    for size, error, begun, lines, rounds, same in report["told"]:
        assert error is not None, f"{size} bytes were enough"
        assert "could not be written" in error
        assert str(tmp_path / str(size)) in error
        assert ("polyrank resume" if begun else "nothing of it is left") in error
        assert rounds == list(range(4 - len(rounds), 4))
        assert same, f"after {size} bytes the run ended elsewhere"
        reached.add((begun, lines, len(rounds)))
    assert (False, 0, 3) in reached, "the folder could not even be begun"
    assert any(rounds < 3 for _, _, rounds in reached), "a finished round was kept"
    assert 0 < report["stuck"] < 3
    assert report["same"]
