"""Measuring this machine as a device for a recipe: `polyrank profile`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w
import torch

from polyrank.errors import RecipeError
from polyrank.planning.devices import DeviceProfile

SHARE = 0.9
"""The part of the memory free now that is written down: the rest is for what is not foreseen."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measured:
    """A machine's figures: `profile` as a recipe takes it, and the rate of every dtype."""

    profile: DeviceProfile
    rates: dict[str, float]
    remarks: tuple[str, ...]

    @property
    def toml(self) -> str:
        """The table ``[devices.NAME]`` of a recipe."""
        return tomli_w.dumps({"devices": {self.profile.name: self.profile.written}})

    @property
    def json(self) -> dict[str, Any]:
        """The same with the rates of all dtypes and the remarks."""
        return {
            "name": self.profile.name,
            **self.profile.written,
            "rates": self.rates,
            "remarks": list(self.remarks),
        }


def measure(
    name: str = "this-machine",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    up: str | None = None,
    down: str | None = None,
    latency: str | None = None,
) -> Measured:
    """Measure this machine's free memory and arithmetic rate; a few seconds.

    `dtype` says whose rate the profile takes; `threads` how many the products may use (CPU). Links
    cannot be measured from one end: `up`, `down` and `latency` are taken as written, e.g.
    ``"20 Mbit/s"`` and ``"30 ms"``, or left out. Raises RecipeError for a device or dtype that is
    not known or not there, and for links that cannot be read.
    """
    if device not in ("cpu", "cuda"):
        raise RecipeError(f"profile: expected the device cpu or cuda, got {device!r}")
    if dtype not in DTYPES:
        raise RecipeError(f"profile: expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("profile: there is no CUDA device here; take --device cpu")
    where = torch.device(device)
    # Links first: a mistake in them should not cost the measuring.
    links = DeviceProfile.of(name, memory=1, up=up, down=down, latency=latency)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rates = {known: rate(torch_dtype, where) for known, torch_dtype in DTYPES.items()}
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    free = free_memory(where)
    memory = int(free * SHARE)
    profile = DeviceProfile(name, memory, rates[dtype], links.up, links.down, links.latency)
    return Measured(profile, rates, tuple(_remarks(profile, where, dtype, rates, free, used)))


def rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.1, times: int = 5) -> float:
    """Return the operations per second of products x·Wᵀ with the sizes of a block's.

    512 tokens (CPU) or 8192 (GPU) times a square W, as wide as lets one product take about
    `seconds`, between 256 and 8192; the median of `times` products, after one that is not counted.
    A multiplication and an addition count as two; four figures are kept.
    """
    tokens = 8192 if device.type == "cuda" else 512
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    width = 256
    while True:
        x = torch.randn(tokens, width, device=device).to(dtype)
        w = torch.randn(width, width, device=device).to(dtype)
        took = _timed(x, w, wait)  # the first of a size warms up
        took = _timed(x, w, wait)
        if took * 4 > seconds or width >= 8192:
            break
        width *= 2
    median = statistics.median([took, *(_timed(x, w, wait) for _ in range(times - 1))])
    return float(f"{2 * tokens * width * width / median:.4g}")


def free_memory(device: torch.device) -> int:
    """Return the bytes free on the device, for a CPU within what a container allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_container()])


def _container(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the container's limit leaves (cgroup v2), if there is one.

    Pages of files that are merely kept count as free, as they do in psutil's figure.
    """
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such files, or the limit is the word "max"
        return []
    return [max(0, limit - used + int(stat.get("inactive_file", 0)))]


def _timed(x: torch.Tensor, w: torch.Tensor, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    torch.nn.functional.linear(x, w)
    wait()
    return max(time.perf_counter() - start, 1e-9)


def _nothing() -> None:
    """On a CPU a product is done when the call returns."""


def _remarks(
    profile: DeviceProfile,
    device: torch.device,
    dtype: str,
    rates: dict[str, float],
    free: int,
    threads: int,
) -> list[str]:
    cuda = device.type == "cuda"
    on = torch.cuda.get_device_name(device) if cuda else f"the CPU (threads: {threads})"
    told = ", ".join(f"{value / 1e9:.1f} GFLOPS in {name}" for name, value in rates.items())
    remarks = [
        f"products on {on}: {told}; flops is the rate in {dtype}",
        f"memory is {SHARE:.0%} of the {free / 2**30:.2f} GiB free now; write less to keep some",
    ]
    missing = [key for key in ("up", "down") if key not in profile.written]
    if missing:
        remarks.append(
            f"{' and '.join(missing)}: one machine alone cannot measure its link; give "
            '--up "20 Mbit/s" --down "100 Mbit/s" --latency "30 ms", else plans do not consider it'
        )
    return remarks
