"""Baselines by name: what the papers compare with, as sets of a recipe's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Baseline:
    """A method that papers compare with, under their name for it: keys of a recipe.

    `fixed` gives values by key, None: the key must not be given. What is in `default` holds where
    the recipe says nothing. With `cut` every client that trains must have a cut, and with `plan`
    the recipe must have a [plan].
    """

    name: str
    fixed: Mapping[str, Any]
    default: Mapping[str, Any] = field(default_factory=dict)
    cut: bool = False
    plan: bool = False

    @property
    def rule(self) -> str:
        """The aggregation rule that it stands for."""
        return str(self.fixed["aggregation.rule"])

    @property
    def pooled(self) -> bool:
        """Whether all training examples are in one place."""
        return bool(self.fixed["data.pooled"])

    @property
    def force(self) -> str | None:
        """The type of every client where the recipe forces none."""
        return self.default.get("fleet.force")


def _federated(rule: str) -> dict[str, Any]:
    return {"aggregation.rule": rule, "data.pooled": False}


def _central(rule: str) -> dict[str, Any]:
    return {"aggregation.rule": rule, "data.pooled": True, "fleet.cuts": None}


_WEAKEST = {"fleet.force": "weakest"}
_UNSCORED = {"plan.importance": "none"}
"""With a [plan], ranks that a budget affords, spread evenly and kept: methods of fixed ranks."""
_HSPLITLORA = _federated("flora")

BASELINES: Mapping[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "splitlora",
            {**_federated("fedit"), "split.adapters": "shared", **_UNSCORED},
            _WEAKEST,
            True,
        ),
        Baseline("cenlora", _central("fedit")),
        Baseline("ft", _central("full")),
        Baseline("hetlora", {**_federated("hetlora"), **_UNSCORED}),
        Baseline("fedlora", {**_federated("fedit"), "fleet.cuts": None, **_UNSCORED}, _WEAKEST),
        Baseline("hsplitlora", _HSPLITLORA, plan=True),
        Baseline("hsplitlora:no-importance", {**_HSPLITLORA, **_UNSCORED}, plan=True),
        Baseline("hsplitlora:no-adaptation", _HSPLITLORA, _WEAKEST, plan=True),
        Baseline(
            "hsplitlora:no-exact-sum",
            {**_federated("hetlora"), "aggregation.gamma": 1.0},
            plan=True,
        ),
    )
}
"""What HSplitLoRA (arXiv 2505.02795) and SplitLoRA (arXiv 2407.00952) are compared with: SplitLoRA
itself, centralised LoRA, full fine-tuning, HetLoRA, and federated LoRA of one rank.

HSplitLoRA is planned ranks and cuts by importance, split training, and noise-free aggregation; its
ablations leave out one part each: importance (ranks are spread evenly), adaptation (all clients
have the plan of the weakest), or the exact sum (factors padded with zeros and averaged, HetLoRA
without pruning [I])."""


def with_baseline(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's content with the keys of the baseline that it names, and contradictions.

    A key that the recipe gives another value contradicts the baseline. Content that is malformed
    is left as it is, for others to say so.
    """
    copied = {key: dict(v) if isinstance(v, Mapping) else v for key, v in content.items()}
    name = copied.get("baseline")
    known = BASELINES.get(name) if isinstance(name, str) else None
    if known is None:
        return copied, []
    wrong: list[str] = []
    for key, value in known.fixed.items():
        given = _given(copied, key)
        if given is None:
            _place(copied, key, value)
        elif given != value:
            own = "none" if value is None else repr(value)
            wrong.append(
                f"baseline = {name!r} and {key} = {given!r} contradict each other: its "
                f"{key.rpartition('.')[2]} is {own}; drop one of the two"
            )
    for key, value in known.default.items():
        if _given(copied, key) is None:
            _place(copied, key, value)
    return copied, wrong


def _given(content: Mapping[str, Any], key: str) -> Any:
    """The value at a key of two parts, None if there is none; an empty table is none."""
    section, _, last = key.partition(".")
    inside = content.get(section)
    value = inside.get(last) if isinstance(inside, dict) else None
    return None if value == {} else value


def _place(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a value; a section that must be there is not made where it is missing."""
    section, _, last = key.partition(".")
    if section in _OWN:
        content.setdefault(section, {})
    inside = content.get(section)
    if value is not None and isinstance(inside, dict):
        inside[last] = value


_OWN = ("aggregation", "split")
"""Sections that a recipe may leave out."""
