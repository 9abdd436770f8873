"""Format strings with plain names in braces: ``Describe: {meaning}``."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from polyrank.errors import RecipeError

Pieces = Sequence[tuple[str, str | None]]


def parse(text: str) -> Pieces:
    """Return the pieces of a format string: literal text and the name that follows it, or None.

    ``{{`` and ``}}`` are braces. RecipeError if braces do not match, a name is empty, or a format
    or a conversion is given.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(f"format string {text!r}: {error}; write {{{{ for a brace") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
        raise RecipeError(
            f"format string {text!r}: expected plain names in braces, such as {{input}}; write "
            "{{ for a brace"
        )
    return [(literal, name) for literal, name, _, _ in parsed]


def fill(pieces: Pieces, values: Mapping[str, str]) -> str:
    """Return the text with every name replaced by its value; braces in values stay as they are."""
    return "".join(text + (values[name] if name else "") for text, name in pieces)
