"""Local methods by name: what the papers' names for a client's training stand for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.errors import RecipeError

if TYPE_CHECKING:
    from polyrank.aggregation import Rule


@dataclass(frozen=True)
class LocalMethod:
    """How clients train, under a paper's name, whichever rule aggregates.

    `optimizers` are those that it may have, its default first; `proximal` is FedProx's μ and
    `sparse_rounds` the rounds of SLoRA's first stage, 0: it has none. A number that is not 0 here
    is a default; one that is 0 belongs to another method.
    """

    name: str
    optimizers: tuple[str, ...]
    proximal: float = 0.0
    sparse_rounds: int = 0

    def settings(
        self,
        optimizer: str | None = None,
        proximal: float | None = None,
        sparse_rounds: int | None = None,
    ) -> LocalSettings:
        """Return the method's settings, with those that are given in the place of its own.

        Raises RecipeError, naming both, for one that makes it another method.
        """
        chosen = LocalSettings(
            self.optimizers[0] if optimizer is None else optimizer,
            self.proximal if proximal is None else proximal,
            self.sparse_rounds if sparse_rounds is None else sparse_rounds,
        )
        if chosen.optimizer not in self.optimizers:
            raise self._contradicted("optimizer", f"{chosen.optimizer!r}", self.optimizers[0])
        if bool(chosen.proximal) != bool(self.proximal):
            raise self._contradicted("proximal", chosen.proximal, self.proximal or "none")
        if bool(chosen.sparse_rounds) != bool(self.sparse_rounds):
            raise self._contradicted(
                "sparse_rounds", chosen.sparse_rounds, self.sparse_rounds or "none"
            )
        return chosen

    def _contradicted(self, key: str, given: object, own: object) -> RecipeError:
        return RecipeError(
            f"local.method = {self.name!r} and local.{key} = {given} contradict each other: its "
            f"{key} is {own}; drop one of the two"
        )


@dataclass(frozen=True)
class LocalSettings:
    """What local methods differ in."""

    optimizer: str = "adamw"
    proximal: float = 0.0
    sparse_rounds: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of all the methods that take part in these settings."""
        names: list[str] = ["fedavg"] if self.optimizer == "sgd" else ["fedit"]
        names += ["fedprox"] if self.proximal else []
        names += ["slora"] if self.sparse_rounds else []
        return tuple(names)

    def with_rule(self, rule: Rule) -> Rule:
        """Return the aggregation rule, within SLoRA where the first rounds are sparse.

        Raises RecipeError if rule and local method exclude each other.
        """
        for method in self.methods:
            if method in rule.excludes:
                raise RecipeError(
                    f"aggregation.rule = {rule.name!r} and the local method {method!r} exclude "
                    f"each other: {rule.excludes[method]}; change one of them"
                )
        if not self.sparse_rounds:
            return rule
        from polyrank.aggregation import SLoRA

        return SLoRA(rule, self.sparse_rounds)


METHODS: Mapping[str, LocalMethod] = {
    method.name: method
    for method in (
        LocalMethod("fedavg", ("sgd",)),
        LocalMethod("fedit", ("adamw",)),
        LocalMethod("fedprox", ("adamw", "sgd"), proximal=0.01),
        LocalMethod("slora", ("adamw", "sgd"), sparse_rounds=5),
    )
}
"""What they stand for [S for FedAvg and FedIT: the base methods of arXiv 2402.11505]:

FedAvg is SGD (arXiv 1602.05629), FedIT is AdamW (arXiv 2305.05644). FedProx is either, held near
the round's start (arXiv 1812.06127); μ = 0.01 is our choice. SLoRA begins with sparse rounds (arXiv
2308.06522), 5 of them unless told otherwise, which is our choice too."""


def local_method(name: str) -> LocalMethod:
    """Return the method of that name; RecipeError, with the nearest name, for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"local.method: expected one of {[*METHODS]}, got {name!r}{hint}")
    return METHODS[name]
