"""Settings of encoding: from examples to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from polyrank.settings import check


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens; see `polyrank.data.encode`."""

    max_length: Annotated[int, Ge(0)] = 0
    """Tokens per example; 0 is the model's context."""
    template: str = "auto"
    """`auto` (the tokenizer's chat template if it has one), `chat`, `plain`, or a text of your own
    with `{prompt}` and `{input}`."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are learnt."""
    too_long: Literal["skip", "cut-prompt", "error"] = "skip"
    """What happens to examples above `max_length`; skipped ones are counted and named."""

    def __post_init__(self) -> None:
        check(self, "data")
