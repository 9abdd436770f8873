"""The settings of [aggregation] in a recipe: the rule and its options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated

from polyrank.settings import Expected

if TYPE_CHECKING:
    from polyrank.aggregation.rule import Rule

DEFAULT = "flexlora:delta"
"""The rule where none is named: of those that send no more than FlexLoRA's own, the one that ended
lowest in docs/explanation/results.md."""


def _names() -> str:
    from polyrank.aggregation.registry import ALIASES, RULES

    return "one of " + ", ".join(map(repr, [*RULES, *ALIASES]))


@dataclass(frozen=True)
class RuleSettings:
    """How clients' updates become the next global adapter."""

    rule: Annotated[str, Expected(_names)] = DEFAULT
    """How updates are aggregated: see [methods](../explanation/methods.md). `flexlora` is the
    paper's, `noise-free` another name of `flora`."""
    split: str | None = None
    """Where FlexLoRA puts the singular values: `left` (B = UΣ) or `balanced`."""
    factorisation: str | None = None
    """FlexLoRA's method of factorisation; left out, chosen by shape."""
    gamma: float | None = None
    """HetLoRA: the share of its rank that a client keeps when it prunes; left out, 0.99; 1: no
    pruning."""
    penalty: float | None = None
    """HetLoRA: strength of the local term on the ranks at stake; left out, 0.01."""
    reinitialise: bool | None = None
    """`flora`: whether every round begins with fresh factors; false is `flora:keep`: clients go on
    with their own. Left out, true."""

    @property
    def options(self) -> dict[str, str | float]:
        """The options of the rule that are given."""
        return {
            key: item for key, item in asdict(self).items() if key in OPTIONS and item is not None
        }

    def build(self) -> Rule:
        """Return the rule; RuleError if there is none of that name with these options."""
        from polyrank.aggregation.registry import rule

        return rule(self.rule, self.options)


OPTIONS = tuple(field.name for field in fields(RuleSettings) if field.name != "rule")
"""What may be set of a rule that has it; everything else is told by the rule's name."""
