"""Number formats of split training: how activations and gradients become bytes on the wire.

    codec("int8").activations.encode(states, "here")      # bytes of a rows×width matrix

A new codec is a module here (or a constant in `floating`), a line in `CODECS`, and a row of the
table "The wire" in the methods page. The tests of codecs, frames and links run over `CODECS`.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import MappingProxyType

from polyrank.codecs.format import Codec, NumberFormat, octets
from polyrank.errors import FrameError

CODECS = MappingProxyType(
    {
        "float32": "floating:FLOAT32",
        "bf16": "floating:BF16",
        "int8": "int8:INT8",
        "float64": "floating:FLOAT64",
    }
)
"""All codecs: the name that recipes use, then module and constant. Reading it loads no torch."""


@cache
def codec(name: str) -> Codec:
    """Return the codec of that name; FrameError for another name, and on a big-endian machine."""
    if sys.byteorder != "little":
        raise FrameError("split training: frames are little-endian, and this machine is not")
    if name not in CODECS:
        raise FrameError(f"wire: expected one of {', '.join(CODECS)}; {name!r} came")
    module, constant = CODECS[name].split(":")
    made: Codec = getattr(import_module(f"{__name__}.{module}"), constant)
    return made


@cache
def number_formats() -> MappingProxyType[int, NumberFormat]:
    """Return the number formats of all codecs, by the number that frames give them."""
    codecs = [codec(name) for name in CODECS]
    used = [each for pair in codecs for each in (pair.activations, pair.gradients)]
    return MappingProxyType({each.number: each for each in used})


__all__ = ["CODECS", "Codec", "NumberFormat", "codec", "number_formats", "octets"]
