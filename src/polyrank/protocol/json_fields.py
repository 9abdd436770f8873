"""JSON that came from elsewhere, read field by field."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Iterator
from typing import Any
from unicodedata import category

from polyrank.errors import PacketError

NAME_BYTES = 1024
"""The longest name of a client, a site or a tensor, in UTF-8."""
WHOLE = 2**63 - 1
"""The largest whole number of a packet."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 60, 60, 40


def refusal(place: str, expected: object, came: object) -> PacketError:
    """Return the error that says what was expected at a place, and that something else came."""
    return PacketError(f"{place}: expected {expected}; {came} came")


def shown(value: object) -> str:
    """Return a value in a few characters, however large it is."""
    return _REPR.repr(value)


def parse(text: str, place: str) -> Any:
    """Return the JSON value of a text.

    PacketError for what is not JSON: NaN and infinity, which Python's parser would let pass; also
    for a key that is there twice, whole numbers of more than 20 digits, and nesting that no packet
    has.
    """

    def whole(digits: str) -> int:
        if len(digits) > 20:
            raise refusal(place, "whole numbers of up to 64 bits", f"one of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> Any:
        raise refusal(place, "JSON, which has finite numbers alone", name)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            raise refusal(place, "each key once", "a key that is there twice")
        return table

    try:
        return json.loads(text, parse_int=whole, parse_constant=constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise refusal(place, "JSON", f"{shown(text)} ({error})") from error


def text(value: object, place: str, most: int = NAME_BYTES, least: int = 1) -> str:
    """Return a text of `least` to `most` bytes in UTF-8."""
    if not isinstance(value, str):
        raise refusal(place, "a text", shown(value))
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:
        raise refusal(place, "text that UTF-8 can hold", ascii(value[:40])) from error
    if not least <= length <= most:
        raise refusal(place, f"a text of {least} to {most} bytes", f"{length} bytes")
    return value


def name(value: object, place: str, most: int = NAME_BYTES, least: int = 1) -> str:
    """Return a text that can be shown in one line: a terminal would obey what is not printable."""
    line = text(value, place, most, least)
    if not line.isprintable() or (least and not line.strip()):
        raise refusal(place, "printable text", ascii(line[:40]))
    return line


def displayable(reason: str) -> str:
    """Return a reason that came from elsewhere without control characters, its lines kept."""
    return "".join(
        c if c == "\n" or c.isprintable() or category(c) == "Zs" else "\ufffd" for c in reason
    )


def whole(value: object, place: str, least: int = 0, most: int = WHOLE) -> int:
    """Return a whole number within bounds; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise refusal(place, f"a whole number of {least} to {most}", shown(value))
    return value


def number(value: object, place: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a finite number within bounds, whole or not; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(place, "a number", shown(value))
    if isinstance(value, int):
        whole(value, place, -WHOLE)
    within = "" if (least, most) == (-math.inf, math.inf) else f" of {least:g} to {most:g}"
    if not (math.isfinite(value) and least <= value <= most):
        raise refusal(place, f"a finite number{within}", shown(value))
    return value


def listed(value: object, place: str) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise refusal(place, "a list", shown(value))
    return value


class Fields:
    """A JSON object: every field is asked for by name, and none may be left over.

    Every method raises PacketError, naming the field, for a value of another type or size.
    """

    def __init__(self, value: object, place: str):
        if not isinstance(value, dict):
            raise refusal(place, "a table", shown(value))
        self.place = place
        self._left: dict[str, Any] = dict(value)

    def take(self, key: str) -> Any:
        """Return a field as it came, which must be there."""
        if key not in self._left:
            raise refusal(f"{self.place}, {key}", "a value", "none")
        return self._left.pop(key)

    def at(self, key: str) -> str:
        """Return the place of a field, for messages."""
        return f"{self.place}, {key}"

    def gone(self, key: str) -> bool:
        """Whether a field is there and null; it counts as read then."""
        if key in self._left and self._left[key] is None:
            del self._left[key]
            return True
        return False

    def text(self, key: str, most: int = NAME_BYTES, least: int = 1) -> str:
        """Return a text of `least` to `most` bytes."""
        return text(self.take(key), self.at(key), most, least)

    def name(self, key: str, most: int = NAME_BYTES, least: int = 1) -> str:
        """Return a text of `least` to `most` bytes that can be shown in one line."""
        return name(self.take(key), self.at(key), most, least)

    def hash(self, key: str) -> str:
        """Return a SHA-256 in hexadecimal digits."""
        value = self.take(key)
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise refusal(self.at(key), "a SHA-256 of 64 hexadecimal digits", shown(value))
        return value

    def choice(self, key: str, options: Collection[str]) -> str:
        """Return one of some texts."""
        value = self.take(key)
        if not isinstance(value, str) or value not in options:
            raise refusal(self.at(key), f"one of {', '.join(options)}", shown(value))
        return value

    def whole(self, key: str, least: int = 0, most: int = WHOLE) -> int:
        """Return a whole number."""
        return whole(self.take(key), self.at(key), least, most)

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number."""
        return number(self.take(key), self.at(key), least, most)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise refusal(self.at(key), "true or false", shown(value))
        return value

    def items(self, key: str) -> list[Any]:
        """Return a list, whose items are still to be checked."""
        return listed(self.take(key), self.at(key))

    def table(self, key: str) -> Fields:
        """Return a table within this one."""
        return Fields(self.take(key), self.at(key))

    def named(self) -> Iterator[tuple[str, Any, str]]:
        """Yield all that is left as (key, value, place): of a table whose keys are names."""
        left, self._left = self._left, {}
        for key, value in left.items():
            yield text(key, f"{self.place}, a name"), value, f"{self.place}, {shown(key)}"

    def close(self) -> None:
        """Refuse fields that nobody asked for."""
        if self._left:
            raise refusal(self.place, "no other field", shown(sorted(self._left)))
