"""The interface of a number format, and what all formats check."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from polyrank.errors import FrameError

if TYPE_CHECKING:  # The names of the codecs are needed where torch is not loaded.
    from torch import Tensor

SUBNORMAL = 2.0**-142
"""More than what float32 numbers lose next to zero, where their spacing stops shrinking."""


class NumberFormat(Protocol):
    """One way to write a matrix as bytes: little-endian, row after row."""

    @property
    def name(self) -> str:
        """The name in error messages."""
        ...

    @property
    def number(self) -> int:
        """The number in frames, 1 to 255; another one for each format."""
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
class Codec:
    """The two number formats of a link: gradients bear coarse rounding less well."""

    name: str
    activations: NumberFormat
    gradients: NumberFormat


def octets(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU as writable bytes, without a copy."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def check_length(payload: memoryview, expected: int, place: str) -> None:
    """Raise FrameError unless a matrix has the expected length in bytes."""
    if len(payload) != expected:
        raise FrameError(f"{place}: expected {expected} bytes of states; {len(payload)} came")


def check_finite(states: Tensor, name: str, place: str) -> None:
    """Raise FrameError unless all numbers are finite in the format of that name."""
    if states.numel() == 0:
        return
    least, most = states.aminmax()  # both pass NaN on, and one pass suffices
    if not (math.isfinite(least) and math.isfinite(most)):
        raise FrameError(
            f"{place}: expected numbers that are finite in {name}; NaN, infinite or too large ones "
            "came; training may have diverged: lower the learning rate, or use a wider wire"
        )
