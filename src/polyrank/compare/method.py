"""A method of a comparison: a rule on the recipe's fleet or on one type, or a named baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from polyrank import config
from polyrank.aggregation import OPTIONS, RULES, Rule, rule
from polyrank.config import Recipe
from polyrank.config.baselines import BASELINES
from polyrank.errors import PolyrankError, RecipeError, RuleError
from polyrank.training import local_method
from polyrank.training.methods import LocalMethod

WEAKEST = "weakest"


@dataclass(frozen=True)
class Method:
    """A rule by name, with `local` a ``local.method`` (None: the recipe's) and `force` a type.

    `baseline` is the name of one, where the method is that: the rule is then the baseline's, and
    its other keys are set too.
    """

    rule: str
    local: str | None = None
    force: str | None = None
    baseline: str | None = None

    @property
    def label(self) -> str:
        """What tables and figures call it, e.g. ``flexlora+slora, all weakest``."""
        return f"{self._name}{f', all {self.force}' if self.force else ''}"

    @property
    def slug(self) -> str:
        """The name of its folder, e.g. ``flexlora-delta`` or ``fedit-all-weakest``."""
        name = self._name.replace(":", "-")
        return f"{name}-all-{self.force}" if self.force else name

    @property
    def _name(self) -> str:
        name = self.baseline or self.rule
        return name if self.local is None else f"{name}+{self.local}"

    @property
    def pooled(self) -> bool:
        """Whether it is a baseline that has all training examples in one place."""
        return self.baseline is not None and BASELINES[self.baseline].pooled

    @property
    def forced(self) -> str | None:
        """The type of every client where the recipe forces none, or None."""
        own = BASELINES[self.baseline].force if self.baseline else None
        return self.force or own

    @property
    def options(self) -> set[str]:
        """The options of `OPTIONS` that its rule has and its name leaves open."""
        own = {field.name for field in fields(rule(self.rule))}  # type: ignore[arg-type]
        return own.intersection(OPTIONS) - {"reinitialise"}

    def recipe(self, base: Recipe, *, rate: float, seed: int) -> Recipe:
        """Return the recipe of one run of this method.

        Options of `base` that the rule does not have are left out, and so is what contradicts a
        local method or a baseline that the method names. RecipeError, naming the method, if rule
        and local method do not go together, as far as it shows without model and data.
        """
        changes: dict[str, Any] = {
            "aggregation.rule": self.rule,
            **{f"aggregation.{key}": None for key in OPTIONS if key not in self.options},
            "local.lr": rate,
            "seed": seed,
            "control": None,
        }
        if self.baseline is not None:
            changes |= {"baseline": self.baseline, **BASELINES[self.baseline].fixed}
        if self.force is not None:
            changes["fleet.force"] = self.force
        if not rule(self.rule).mixed_ranks:
            changes["aggregation.server_rank"] = None  # It needs the clients' rank.
        try:
            if self.local is not None:
                changes |= _local(local_method(self.local), base)
            changed = config.parse(_changed(asdict(base), changes))
            changed.check()
        except PolyrankError as error:
            raise RecipeError(f"compare, method {self.label!r}: {error}") from error
        return changed


def _local(method: LocalMethod, base: Recipe) -> dict[str, Any]:
    """The changes by which a recipe's local training becomes that of a method by name."""
    changes: dict[str, Any] = {"local.method": method.name}
    if not method.proximal:
        changes["local.proximal"] = None
    if not method.sparse_rounds:
        changes["local.sparse_rounds"] = None
    if base.local.resolved.optimizer not in method.optimizers:
        changes["local.optimizer"] = None
    return changes


def methods(rules: Sequence[str], control: str | None, recipe: Recipe) -> list[Method]:
    """Return the methods of these rules, ``RULE`` or ``RULE+METHOD``, and the control's.

    The name of a baseline may stand for a rule. A rule that needs one rank for all runs with every
    client of the weakest type, unless the recipe forces one already. `control` adds the first rule
    with every client of that type.
    Raises RuleError for an unknown rule, RecipeError for none or one that is named twice.
    """
    if not rules:
        raise RecipeError("compare: expected at least one rule, e.g. --rules flexlora,fedit")
    chosen: list[Method] = []
    for text in rules:
        name, _, local = text.partition("+")
        if name in BASELINES and name not in RULES:
            chosen.append(Method(BASELINES[name].rule, local or None, None, name))
            continue
        mixed = _rule(name).mixed_ranks or recipe.fleet.force is not None
        chosen.append(Method(name, local or None, None if mixed else WEAKEST))
    if control is not None:
        extra = replace(chosen[0], force=control)
        if extra not in chosen and control != chosen[0].forced:
            chosen.append(extra)
    slugs = [method.slug for method in chosen]
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise RecipeError(f"compare: {twice[0]} is named twice in --rules; name each rule once")
    return chosen


def _rule(name: str) -> Rule:
    """Return the rule; RuleError for an unknown name tells the baselines too."""
    try:
        return rule(name)
    except RuleError as error:
        raise RuleError(f"{error}; or a baseline: {sorted(BASELINES)}") from error


def _changed(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the values at these dotted keys changed.

    A key of a section that the recipe leaves out, such as [plan], is left out too.
    """
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner: dict[str, Any] | None = content
        for section in sections:
            inner = None if inner is None else inner[section]
        if inner is not None:
            inner[last] = value
    return content
