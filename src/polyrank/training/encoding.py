"""How examples become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens; see `polyrank.data.encode`.

    `max_length` 0 means the model's context.
    """

    max_length: int = 0
    template: str = "auto"
    loss_on: Literal["completion", "all"] = "completion"
    too_long: Literal["skip", "cut-prompt", "error"] = "skip"
