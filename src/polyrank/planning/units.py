"""Amounts written with units: "6 GiB", "1.2 TFLOPS", "100 Mbit/s", "20 ms"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from polyrank.errors import RecipeError

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

_BYTES: Mapping[str, float] = {
    f"{prefix}B": size for prefix, size in (_DECIMAL | {"K": 1e3} | _BINARY).items()
}
_FLOPS: Mapping[str, float] = {
    f"{prefix}FLOPS": size for prefix, size in (_DECIMAL | {"P": 1e15}).items()
}
_LINKS: Mapping[str, float] = (
    {f"{prefix}bit/s": size / 8 for prefix, size in _DECIMAL.items()}
    | {f"{prefix}bps": size / 8 for prefix, size in _DECIMAL.items()}
    | {f"{prefix}B/s": size for prefix, size in (_DECIMAL | _BINARY).items()}
)
_SECONDS: Mapping[str, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*(\D*?)\s*")


def parse_bytes(written: int | float | str, place: str = "memory") -> int:
    """Return bytes of e.g. ``"6 GiB"`` (2³⁰), ``"8 GB"`` (10⁹) or a plain number of bytes.

    Parts of a byte are dropped. `place` names the key in errors. Raises RecipeError for other
    texts, and for amounts that are negative or not finite.
    """
    return int(_amount(written, _BYTES, place, '"6 GiB", "512 MiB", "8 GB" or a number of bytes'))


def parse_flops(written: int | float | str, place: str = "flops") -> float:
    """Return floating-point operations per second of e.g. ``"1.2 TFLOPS"`` or a plain number.

    RecipeError as for `parse_bytes`.
    """
    expected = '"1.2 TFLOPS", "150 GFLOPS" or a number of operations per second'
    return _amount(written, _FLOPS, place, expected)


def parse_link(written: int | float | str, place: str = "link") -> float:
    """Return bytes per second of e.g. ``"100 Mbit/s"``, ``"12 MB/s"``, or a number of them.

    Bits take ``bit/s`` or ``bps``, bytes ``B/s``: an eighth between them. RecipeError as for
    `parse_bytes`.
    """
    expected = '"100 Mbit/s", "12 MB/s" or a number of bytes per second'
    return _amount(written, _LINKS, place, expected)


def parse_seconds(written: int | float | str, place: str = "latency") -> float:
    """Return seconds of e.g. ``"20 ms"``, ``"0.1 s"`` or a plain number.

    RecipeError as for `parse_bytes`.
    """
    return _amount(written, _SECONDS, place, '"20 ms", "0.1 s" or a number of seconds')


def _amount(
    written: int | float | str, units: Mapping[str, float], place: str, expected: str
) -> float:
    """The amount in base units; upper and lower case matter, as b is not B and m is not M."""
    if isinstance(written, bool) or not isinstance(written, (int, float, str)):
        raise RecipeError(f"{place}: expected {expected}, got {written!r}")
    if isinstance(written, str):
        match = _AMOUNT.fullmatch(written)
        if match is None:
            raise RecipeError(f"{place}: expected {expected}, got the text {written!r}")
        number, unit = float(match[1]), match[2]
        if unit and unit not in units:
            raise RecipeError(
                f"{place}: unknown unit {unit!r} in {written!r}; expected {expected}; units are "
                f"{', '.join(units)}, and upper and lower case matter"
            )
        amount = number * units[unit] if unit else number
    else:
        amount = float(written)
    if not math.isfinite(amount) or amount < 0:
        raise RecipeError(f"{place}: expected {expected}, finite and not negative; got {written!r}")
    return amount
