"""Every number in one floating-point type, activations and gradients alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.codecs.format import SUBNORMAL, Codec, check_finite, check_length, octets


@dataclass(frozen=True)
class Floating:
    """Numbers rounded to the nearest of `dtype`.

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
        check_finite(written, self.name, place)
        return octets(written)

    def decode(  # noqa: D102
        self, payload: memoryview, rows: int, width: int, place: str
    ) -> Tensor:
        check_length(payload, self.nbytes(rows, width), place)
        written = torch.empty(rows, width, dtype=self.dtype)
        octets(written)[:] = payload
        check_finite(written, self.name, place)
        return written if self.dtype == torch.float64 else written.float()

    def bound(self, states: Tensor) -> Tensor:  # noqa: D102
        states = states.double()
        if self.relative == 0:
            return torch.zeros_like(states)
        return states.abs() * self.relative + SUBNORMAL * 2**16

    def codec(self) -> Codec:
        """Return the codec that writes both activations and gradients so."""
        return Codec(self.name, self, self)


FLOAT64 = Floating("float64", 1, torch.float64, 0.0).codec()
FLOAT32 = Floating("float32", 2, torch.float32, 2.0**-24).codec()
BF16 = Floating("bf16", 3, torch.bfloat16, 2.0**-8).codec()
