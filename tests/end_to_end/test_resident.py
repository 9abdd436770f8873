"""A process that holds one side of a model takes the memory of that side, not of the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models import batch, write_tiny
from polyrank.model import load_model, logits_at

DRIVER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from models import batch
from polyrank.model import Cut, Span, load_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

side, folder, hidden, out, cut = *sys.argv[1:5], int(sys.argv[5])
with torch.no_grad():
    if side == "head":
        model = load_model(folder, device="cpu", spans=[Span(0, cut)])
        save_file({"hidden": Cut(model, cut).head(batch(2, 8))}, hidden)
    if side == "tail":
        model = load_model(folder, device="cpu", spans=[Span(cut)])
        states = load_file(hidden)["hidden"]
        logits = Cut(model, cut).tail(states, torch.arange(16))
        save_file({"logits": logits}, out)
print(peak())
"""

BLOCKS, CUT = 8, 3
SIZES = {
    "num_hidden_layers": BLOCKS,
    "vocab_size": 16_384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}

ALLOWED = 1.15
"""What one side may take beside its weights: activations, buffers and the library's own."""


def peak(side: str, folder: Path, work: Path) -> int:
    """Return the most memory that a process of its own ever had, in bytes."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, side, folder, work / "hidden", work / "out", str(CUT)],
        env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def is_head(name: str) -> bool:
    """Whether a tensor of the file belongs to the head."""
    if ".layers." in name:
        return int(name.split(".layers.")[1].split(".")[0]) < CUT
    return name == "model.embed_tokens.weight"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_each_side_takes_the_memory_of_its_own_weights(tmp_path):
    folder = write_tiny(tmp_path / "base", "llama", **SIZES)
    try:
        sizes = {"head": 0, "tail": 0}
        with safe_open(folder / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                size = 4 * torch.Size(file.get_slice(name).get_shape()).numel()
                sizes["head" if is_head(name) else "tail"] += size
        assert sum(sizes.values()) > 400 * 2**20
        empty = peak("neither", folder, tmp_path)
        for side, size in sizes.items():  # The head first: the tail reads what it has written.
            taken = peak(side, folder, tmp_path) - empty
            print(f"{side}: {size / 2**20:.0f} MiB of weights, {taken / 2**20:.0f} MiB taken")
            assert 0.9 * size < taken < ALLOWED * size
        whole = load_model(folder, device="cpu")
        with torch.no_grad():
            expected = logits_at(whole, batch(2, 8), torch.arange(16))
        assert torch.equal(load_file(tmp_path / "out")["logits"], expected)
    finally:
        shutil.rmtree(folder)
