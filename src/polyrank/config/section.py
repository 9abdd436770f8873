"""What every section of a recipe is: strict, and documented key by key."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Expected:
    """What a key takes, in words, where its type alone reads badly."""

    words: str


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no infinities."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
