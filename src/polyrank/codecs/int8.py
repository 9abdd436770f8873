"""Activations as 8-bit whole numbers with a scale per token; gradients in bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.codecs.floating import BF16
from polyrank.codecs.format import SUBNORMAL, Codec, check_finite, check_length, octets
from polyrank.errors import FrameError


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
        check_finite(scales * 127, self.name, place)  # the largest numbers that will be read
        divisors = torch.where(scales > 0, scales, 1.0)
        whole = (states / divisors[:, None]).round_().clamp_(-127, 127)
        written = torch.empty(self.nbytes(rows, width), dtype=torch.uint8)
        written[: 4 * rows] = scales.view(torch.uint8)
        written[4 * rows :].view(torch.int8).view(rows, width).copy_(whole)
        return octets(written)

    def decode(  # noqa: D102
        self, payload: memoryview, rows: int, width: int, place: str
    ) -> Tensor:
        check_length(payload, self.nbytes(rows, width), place)
        scales = torch.empty(rows, dtype=torch.float32)
        octets(scales)[:] = payload[: 4 * rows]
        whole = torch.empty(rows, width, dtype=torch.int8)
        octets(whole)[:] = payload[4 * rows :]
        if not bool((scales >= 0).all()):
            raise FrameError(f"{place}: the scales of int8 must be 0 or more; others came")
        states = whole.float().mul_(scales[:, None])
        check_finite(states, self.name, place)
        return states

    def bound(self, states: Tensor) -> Tensor:  # noqa: D102
        # 2^-14 covers the float32 roundings of scale, quotient and product, each up to 127·2^-24
        # scales; SUBNORMAL covers scales that have few digits, or underflow to 0.
        largest = states.double().abs().amax(dim=1, keepdim=True)
        return (largest / 254 * (1 + 2.0**-14) + SUBNORMAL).expand(states.shape)


INT8 = Codec("int8", Int8(), BF16.gradients)
