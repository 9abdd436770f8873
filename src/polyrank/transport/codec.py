"""How a matrix of activations or gradients becomes bytes, and how much of it is lost.

A `Coding` is one way; a `Codec` names the two codings that a link uses, one for activations and one
for gradients. All bytes are little-endian, row after row.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyrank.errors import FrameError

_SUBNORMAL = 2.0**-142
"""More than what float32 numbers lose next to zero, where their spacing stops shrinking."""


class Coding(Protocol):
    """One way to write a matrix as bytes."""

    @property
    def name(self) -> str:
        """As recipes name it."""
        ...

    @property
    def number(self) -> int:
        """As frames name it: 1 to 255."""
        ...

    def nbytes(self, rows: int, width: int) -> int:
        """Return how many bytes a rows×width matrix takes, exactly."""
        ...

    def encode(self, states: Tensor, place: str) -> memoryview:
        """Return the bytes of a matrix, which may share the matrix's memory.

        Raises FrameError, naming `place`, if a number is not finite, or is too large to be written.
        """
        ...

    def decode(self, payload: memoryview, rows: int, width: int, place: str) -> Tensor:
        """Return the matrix that was written, in float32, or in float64 if that was written.

        Raises FrameError, naming `place`, if the length is wrong or a number is not finite.
        """
        ...

    def bound(self, states: Tensor) -> Tensor:
        """Return the most that each entry of decode(encode(states)) can be off, in float64."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every number in one floating-point type, rounded to nearest.

    An entry x is off by at most `relative`·|x|, plus what is lost next to zero.
    """

    name: str
    number: int
    dtype: torch.dtype
    relative: float

    def nbytes(self, rows: int, width: int) -> int:  # noqa: D102
        return rows * width * self.dtype.itemsize

    def encode(self, states: Tensor, place: str) -> memoryview:  # noqa: D102
        written = states.detach().to("cpu", self.dtype).contiguous()
        _finite(written, self.name, place)
        return octets(written)

    def decode(  # noqa: D102
        self, payload: memoryview, rows: int, width: int, place: str
    ) -> Tensor:
        _length(payload, self.nbytes(rows, width), place)
        written = torch.empty(rows, width, dtype=self.dtype)
        octets(written)[:] = payload
        _finite(written, self.name, place)
        return written if self.dtype == torch.float64 else written.float()

    def bound(self, states: Tensor) -> Tensor:  # noqa: D102
        states = states.double()
        if self.relative == 0:
            return torch.zeros_like(states)
        return states.abs() * self.relative + _SUBNORMAL * 2**16


@dataclass(frozen=True)
class Int8:
    """Every row (a token) as whole numbers of −127 to 127, times a scale of its own.

    scale = max|x| / 127 and x ≈ scale·round(x / scale); a row of zeros has the scale 0. Bytes: all
    scales in float32, then all numbers. An entry is off by at most half a scale, that is
    max|x| / 254 of its row, plus the rounding of the scale and of the product to float32.
    Source: absmax quantisation, as in LLM.int8() (arXiv 2208.07339, section 2.1), per row.
    """

    name: str = "int8"
    number: int = 4

    def nbytes(self, rows: int, width: int) -> int:  # noqa: D102
        return rows * (4 + width)

    def encode(self, states: Tensor, place: str) -> memoryview:  # noqa: D102
        states = states.detach().to("cpu", torch.float32)
        rows, width = states.shape
        scales = states.abs().amax(dim=1).div_(127)
        _finite(scales * 127, self.name, place)  # the largest numbers that will be read
        divisors = torch.where(scales > 0, scales, 1.0)
        whole = (states / divisors[:, None]).round_().clamp_(-127, 127)
        written = torch.empty(self.nbytes(rows, width), dtype=torch.uint8)
        written[: 4 * rows] = scales.view(torch.uint8)
        written[4 * rows :].view(torch.int8).view(rows, width).copy_(whole)
        return octets(written)

    def decode(  # noqa: D102
        self, payload: memoryview, rows: int, width: int, place: str
    ) -> Tensor:
        _length(payload, self.nbytes(rows, width), place)
        scales = torch.empty(rows, dtype=torch.float32)
        octets(scales)[:] = payload[: 4 * rows]
        whole = torch.empty(rows, width, dtype=torch.int8)
        octets(whole)[:] = payload[4 * rows :]
        if not bool((scales >= 0).all()):
            raise FrameError(f"{place}: the scales of int8 must be 0 or more; others came")
        states = whole.float().mul_(scales[:, None])
        _finite(states, self.name, place)
        return states

    def bound(self, states: Tensor) -> Tensor:  # noqa: D102
        # 2^-14 covers the float32 roundings of scale, quotient and product, each up to 127·2^-24
        # scales; _SUBNORMAL covers scales that have few digits, or underflow to 0.
        largest = states.double().abs().amax(dim=1, keepdim=True)
        return (largest / 254 * (1 + 2.0**-14) + _SUBNORMAL).expand(states.shape)


@dataclass(frozen=True)
class Codec:
    """The two codings of a link: for activations, which bear coarse rounding, and for gradients."""

    name: str
    activations: Coding
    gradients: Coding


FLOAT64 = Plain("float64", 1, torch.float64, 0.0)
FLOAT32 = Plain("float32", 2, torch.float32, 2.0**-24)
BF16 = Plain("bf16", 3, torch.bfloat16, 2.0**-8)
INT8 = Int8()

CODINGS: tuple[Coding, ...] = (FLOAT64, FLOAT32, BF16, INT8)
CODECS = {
    codec.name: codec
    for codec in (
        Codec("float64", FLOAT64, FLOAT64),
        Codec("float32", FLOAT32, FLOAT32),
        Codec("bf16", BF16, BF16),
        Codec("int8", INT8, BF16),
    )
}


def codec(name: str) -> Codec:
    """Return the codec of that name: float64, float32, bf16 or int8.

    int8 sends activations as int8 per token and gradients as bf16; the others send both alike.
    Raises FrameError for another name, and on a big-endian machine.
    """
    if sys.byteorder != "little":
        raise FrameError("split training: frames are little-endian, and this machine is not")
    if name not in CODECS:
        raise FrameError(f"wire: expected one of {', '.join(CODECS)}; {name!r} came")
    return CODECS[name]


def octets(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU as writable bytes, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _length(payload: memoryview, expected: int, place: str) -> None:
    if len(payload) != expected:
        raise FrameError(f"{place}: expected {expected} bytes of states; {len(payload)} came")


def _finite(states: Tensor, name: str, place: str) -> None:
    if states.numel() == 0:
        return
    least, most = torch.aminmax(states)  # both pass NaN on, and one pass suffices
    if not (math.isfinite(least) and math.isfinite(most)):
        raise FrameError(
            f"{place}: expected numbers that are finite in {name}; NaN, infinite or too large ones "
            "came; training may have diverged: lower the learning rate, or use a wider wire"
        )
