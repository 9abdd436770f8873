"""Devices: the memory, arithmetic and links that a machine offers; some real ones by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from polyrank.errors import RecipeError
from polyrank.planning.units import parse_bytes, parse_flops, parse_link, parse_seconds


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class DeviceProfile:
    """What one device offers.

    - `memory_bytes`: bytes that training may use, after what the system takes.
    - `flops`: arithmetic rate in floating-point operations per second, a multiplication and an
      addition counting as two, at the dtype that is trained in.
    - `up`, `down`: bytes per second from the device to the server and back.
    - `latency`: seconds that a message takes one way, beside its bytes.

    None means not limited by it: a plan does not consider it. Raises RecipeError, naming
    ``devices.NAME.KEY``, for figures that are missing, zero, negative or not finite.
    """

    name: str
    memory_bytes: int
    flops: float | None = None
    up: float | None = None
    down: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        place = f"devices.{self.name}"
        memory = self.memory_bytes
        if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
            raise RecipeError(
                f"{place}.memory: expected a whole number of bytes above zero, got {memory!r}"
            )
        rates = {"flops": self.flops, "up": self.up, "down": self.down}
        for key, rate in rates.items():
            if rate is not None and not (_is_number(rate) and math.isfinite(rate) and rate > 0):
                raise RecipeError(
                    f"{place}.{key}: expected a finite number above zero, got {rate!r}; "
                    "leave the key out if it does not limit the device"
                )
        if not (_is_number(self.latency) and math.isfinite(self.latency) and self.latency >= 0):
            raise RecipeError(
                f"{place}.latency: expected seconds, finite and not negative; got {self.latency!r}"
            )

    @staticmethod
    def of(
        name: str,
        *,
        memory: int | float | str | None,
        flops: int | float | str | None = None,
        up: int | float | str | None = None,
        down: int | float | str | None = None,
        latency: int | float | str | None = None,
    ) -> DeviceProfile:
        """Return the profile that a recipe's table writes: numbers, or texts with units.

        See `polyrank.planning.units` for the texts. Raises RecipeError naming the key.
        """
        place = f"devices.{name}"
        if memory is None:
            raise RecipeError(
                f'{place}.memory: missing; say how much training may use, e.g. memory = "6 GiB"'
            )
        return DeviceProfile(
            name,
            parse_bytes(memory, f"{place}.memory"),
            None if flops is None else parse_flops(flops, f"{place}.flops"),
            None if up is None else parse_link(up, f"{place}.up"),
            None if down is None else parse_link(down, f"{place}.down"),
            0.0 if latency is None else parse_seconds(latency, f"{place}.latency"),
        )

    @property
    def written(self) -> dict[str, int | float]:
        """The table that a recipe takes, in bytes, operations and seconds; unlimited left out."""
        rates = {"flops": self.flops, "up": self.up, "down": self.down}
        given = {key: rate for key, rate in rates.items() if rate is not None}
        latency = {"latency": self.latency} if self.latency else {}
        return {"memory": self.memory_bytes, **given, **latency}


@dataclass(frozen=True)
class Published:
    """Published figures of a real device.

    - `memory`: bytes that it is sold with (GB read as 10⁹, the cautious reading).
    - `share`: the part of them that training may use [I].
    - `rates`: arithmetic rate per dtype, dense; a dtype that is missing runs at float32's.
    - `source`: where the figures stand.
    """

    memory: int
    share: float
    rates: Mapping[str, float]
    source: str

    def profile(self, name: str, dtype: str = "float32") -> DeviceProfile:
        """Return the device as a plan takes it, for training in that dtype, without links."""
        rate = self.rates.get(dtype, self.rates["float32"])
        return DeviceProfile(name, int(self.memory * self.share), rate)


GPU, SHARED, PHONE = 0.9, 0.7, 0.4
"""Shares of memory for training [I]: a GPU of its own loses its context and what the allocator
cannot reuse; a computer shares with system and desktop; a phone ends apps that take about half."""

PUBLISHED: Mapping[str, Published] = {
    "pixel-8": Published(
        parse_bytes("8 GB"),
        PHONE,
        {"float32": 375.3e9},
        "Memory: Google Pixel 8 technical specifications. CPU, measured, all nine cores: vfpbench, "
        "log 'Google Tensor G3 Pixel 8' of 2024-06-16",
    ),
    "raspberry-pi-5-8gb": Published(
        parse_bytes("8 GB"),
        SHARED,
        {"float32": 153.6e9},
        "Raspberry Pi 5 product brief: 4 Cortex-A76 cores at 2.4 GHz, 8 GB. Rate [D]: two 128-bit "
        "multiply-add pipes a core (Arm Cortex-A76 Software Optimization Guide), 16 operations a "
        "cycle",
    ),
    "jetson-orin-nano-8gb": Published(
        parse_bytes("8 GB"),
        SHARED,
        {"float32": 1.28e12},
        "Jetson Orin Nano Series data sheet: 8 GB shared by CPU and GPU, 1024 CUDA cores at "
        "625 MHz. Rate [D]: 2 operations a core and cycle",
    ),
    "laptop-ryzen-7840hs-16gb": Published(
        parse_bytes("16 GB"),
        SHARED,
        {"float32": 1.223e12, "bfloat16": 2.361e12},
        "CPU, measured, multiply-add on all eight cores: vfpbench, log 'AMD Ryzen 7 7840HS w/ "
        "Radeon 780M Graphics' of 2026-04-05. Memory: a common configuration",
    ),
    "t4": Published(
        parse_bytes("16 GB"),
        GPU,
        {"float32": 8.1e12},
        "NVIDIA T4 datasheet: 16 GB GDDR6, 8.1 TFLOPS single precision (no bfloat16)",
    ),
    "l4": Published(
        parse_bytes("24 GB"),
        GPU,
        {"float32": 30.3e12, "bfloat16": 121e12},
        "NVIDIA L4 datasheet: 24 GB, 30.3 TFLOPS FP32, 242 BFLOAT16 with sparsity, half without",
    ),
    "rtx-4090": Published(
        parse_bytes("24 GB"),
        GPU,
        {"float32": 82.6e12, "bfloat16": 165.2e12},
        "NVIDIA Ada GPU Architecture whitepaper: 24 GB, 82.6 TFLOPS FP32, 165.2 dense BF16",
    ),
    "a100-40gb": Published(
        parse_bytes("40 GB"),
        GPU,
        {"float32": 19.5e12, "bfloat16": 312e12},
        "NVIDIA A100 datasheet: 40 GB, 19.5 TFLOPS FP32, 312 dense BFLOAT16",
    ),
    "h100-80gb": Published(
        parse_bytes("80 GB"),
        GPU,
        {"float32": 67e12, "bfloat16": 989e12},
        "NVIDIA H100 datasheet (SXM): 80 GB, 67 TFLOPS FP32, 1,979 BFLOAT16 with sparsity, half "
        "without",
    ),
}
"""Real devices by name, with their source; docs/reference/devices.md says more. The rates are
peaks: training reaches a part of them, so that times planned with them are lower bounds.
`polyrank profile` measures what a machine reaches."""

DEVICES: Mapping[str, DeviceProfile] = {
    name: published.profile(name) for name, published in PUBLISHED.items()
}
"""The same as profiles for training in float32."""


def device(
    name: str, own: Mapping[str, DeviceProfile] | None = None, dtype: str = "float32"
) -> DeviceProfile:
    """Return a device by name: one of the recipe's `own`, else a real one at that dtype's rate.

    Raises RecipeError with the nearest names for one that is in neither.
    """
    described = own or {}
    if name in described:
        return described[name]
    if name in PUBLISHED:
        return PUBLISHED[name].profile(name, dtype)
    known = [*described, *PUBLISHED]
    near = difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {known};"
    raise RecipeError(
        f"devices: there is no device {name!r}; {meant} Or describe it in a table [devices.{name}] "
        "(`polyrank profile` writes one)"
    )
