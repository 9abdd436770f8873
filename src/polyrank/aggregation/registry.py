"""Rules by the names that recipes use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from polyrank.aggregation.choose import choose
from polyrank.aggregation.custom import custom_rule, is_custom
from polyrank.aggregation.fedit import FedIT
from polyrank.aggregation.ffa import FFA
from polyrank.aggregation.flexlora import FlexLoRA
from polyrank.aggregation.flora import FLoRA
from polyrank.aggregation.full import Full
from polyrank.aggregation.hetlora import HetLoRA
from polyrank.aggregation.raflora import RaFLoRA
from polyrank.aggregation.rule import Rule
from polyrank.aggregation.segment import Segment
from polyrank.aggregation.settings import OPTIONS
from polyrank.errors import RuleError

RULES: Mapping[str, Rule] = {
    known.name: known
    for known in (
        FlexLoRA(),
        FlexLoRA("delta"),
        FlexLoRA("tail-in-base"),
        RaFLoRA(),
        FedIT(),
        HetLoRA(),
        Segment(),
        FFA(),
        FFA(correction=False),
        FLoRA(),
        FLoRA(reinitialise=False),
        Full(),
    )
}

ALIASES: Mapping[str, str] = {"noise-free": "flora"}
"""Other names of rules: HSplitLoRA's noise-free aggregation is FLoRA's."""


def rule(name: str, options: Mapping[str, str | float | None] | None = None) -> Rule:
    """Return the rule of that name with its options; None leaves a rule's own default.

    Names: the keys of `RULES` and `ALIASES`, and ``module:Class`` for a class of the user's own,
    which is imported only within `code_allowed`. Options: those of `OPTIONS` that the rule has as a
    field; ``reinitialise`` false makes ``flora`` ``flora:keep``. Raises RuleError, with the nearest
    name, for an unknown name or value, for an option that the rule does not have, and for one that
    contradicts the name.
    """
    if is_custom(name):
        return custom_rule(name, {k: v for k, v in (options or {}).items() if v is not None})
    known = choose("rule", name, {**RULES, **{other: RULES[of] for other, of in ALIASES.items()}})
    given = {key: value for key, value in (options or {}).items() if value is not None}
    own = {field.name for field in fields(known)}.intersection(OPTIONS)  # type: ignore[arg-type]
    excess = sorted(given.keys() - own)
    if excess:
        has = f"it has {sorted(own)}" if own else "it has none"
        raise RuleError(f"rule {name!r} has no option {excess[0]!r} ({has}); leave it out")
    made: Rule = replace(known, **given)  # type: ignore[type-var]
    if ":" in known.name and made.name != known.name:
        raise RuleError(f"rule {name!r}: with {given} it would be {made.name!r}; drop one of them")
    return made
