"""Rules by the names that recipes use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from polyrank.aggregation.choose import choose
from polyrank.aggregation.fedit import FedIT
from polyrank.aggregation.flexlora import FlexLoRA
from polyrank.aggregation.rule import Rule
from polyrank.errors import RuleError

RULES: Mapping[str, Rule] = {
    known.name: known
    for known in (FlexLoRA(), FlexLoRA("delta"), FlexLoRA("tail-in-base"), FedIT())
}


def rule(name: str, *, split: str | None = None, factorisation: str | None = None) -> Rule:
    """Return the rule of that name with its options; None leaves a rule's own default.

    Names: ``flexlora`` (the paper's), ``flexlora:delta``, ``flexlora:tail-in-base``, ``fedit``.
    Raises RuleError, with the nearest name, for an unknown name or value, and for an option that
    the rule does not have.
    """
    known = choose("rule", name, RULES)
    given = {"split": split, "factorisation": factorisation}
    options = {key: value for key, value in given.items() if value is not None}
    excess = sorted(options.keys() - _options(known))
    if excess:
        raise RuleError(f"rule {name!r} has no option {excess[0]!r}; leave it out")
    return replace(known, **options)  # type: ignore[type-var]


def _options(known: Rule) -> set[str]:
    return {field.name for field in fields(known)}  # type: ignore[arg-type]
