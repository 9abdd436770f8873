"""A comparison's request: its methods, seeds and rates, kept in a file of its folder."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from polyrank import config
from polyrank.compare.method import Method, methods
from polyrank.compare.tuning import default_grid
from polyrank.config import Recipe
from polyrank.errors import RecipeError, RunError
from polyrank.run import storage
from polyrank.run.environment import flat

FILE = "comparison.toml"
SCHEMA = 1
_FREE = ("name", "control", "aggregation.rule")
"""Keys of a recipe that a comparison does not use."""


def is_comparison(folder: Path) -> bool:
    """Whether this is the folder of a comparison, finished or not."""
    return (folder / FILE).is_file()


@dataclass(frozen=True)
class Request:
    """The rules, how many seeds (the recipe's and those after it), the control, and the rates.

    With `tune` the rates are a grid for every method, otherwise the one rate of the recipe.
    """

    recipe: Recipe
    rules: tuple[str, ...]
    seeds: int
    control: str | None
    tune: bool
    rates: tuple[float, ...]

    @staticmethod
    def of(
        recipe: Recipe,
        rules: tuple[str, ...],
        *,
        seeds: int,
        control: str | None = None,
        tune: bool = False,
        rates: tuple[float, ...] | None = None,
    ) -> Request:
        """Return a request that can be carried out; RecipeError or RuleError says why not.

        Without `control` the recipe's own is taken, without `rates` the recipe's, or with `tune`
        the grid around it.
        """
        if recipe.baseline is not None:
            raise RecipeError(
                f"compare: the recipe is the baseline {recipe.baseline!r}, which would hold for "
                "all methods; drop the key, and name it among --rules"
            )
        if seeds < 1:
            raise RecipeError(f"compare: seeds: expected at least 1, got {seeds}")
        if rates is not None and not tune:
            raise RecipeError("compare: rates are a grid to choose from; give --tune with --rates")
        if rates is not None and not (
            rates and all(math.isfinite(rate) and rate > 0 for rate in rates)
        ):
            raise RecipeError(f"compare: rates: expected numbers above 0, got {[*rates]}")
        if tune and not 0 < recipe.evaluation.every <= recipe.rounds:
            raise RecipeError(
                "compare: tuning needs the validation loss; set evaluation.every to between 1 and "
                f"rounds = {recipe.rounds}, e.g. evaluation.every={recipe.rounds}"
            )
        grid = (rates or default_grid(recipe.local.lr)) if tune else (recipe.local.lr,)
        asked = Request(
            recipe.resolved(),
            rules,
            seeds,
            recipe.control if control is None else control,
            tune,
            tuple(sorted(set(grid))),
        )
        given = recipe.aggregation.options
        unused = sorted(given.keys() - {key for method in asked.methods for key in method.options})
        if unused:
            raise RecipeError(
                f"compare: aggregation.{unused[0]}: none of the rules has it beside what its name "
                "tells; leave it out"
            )
        for method in asked.methods:  # Mistakes show before anything is begun.
            method.recipe(asked.recipe, rate=asked.rates[0], seed=recipe.seed)
        return asked

    @property
    def methods(self) -> list[Method]:
        """The methods, the first of which the others are compared with."""
        return methods(self.rules, self.control, self.recipe)

    @property
    def seed_values(self) -> list[int]:
        """The seeds: the recipe's and those after it."""
        return [self.recipe.seed + i for i in range(self.seeds)]

    def save(self, folder: Path) -> None:
        """Write the request into the comparison's folder."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del content["recipe"]
        known = {key: value for key, value in content.items() if value is not None}
        recipe = tomllib.loads(self.recipe.to_toml())
        text = tomli_w.dumps({"schema": SCHEMA, **known, "recipe": recipe})
        storage.write_text(folder / FILE, text)

    @staticmethod
    def load(folder: Path) -> Request:
        """Read what `save` wrote; RunError if the folder holds no comparison."""
        file = folder / FILE
        if not file.is_file():
            raise RunError(f"{folder}: expected the folder of a comparison, with a {FILE} in it")
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{file}: not valid TOML: {error}") from error
        if content.get("schema") != SCHEMA:
            raise RunError(
                f"{file}: expected schema {SCHEMA}, got {content.get('schema')}; another version "
                "wrote it"
            )
        try:
            return Request(
                config.parse(content["recipe"], f"{file}, recipe"),
                tuple(content["rules"]),
                content["seeds"],
                content.get("control"),
                content["tune"],
                tuple(content["rates"]),
            )
        except KeyError as error:
            raise RunError(f"{file}: the key {error} is missing; restore the file") from error

    def continues(self, before: Request, folder: Path) -> None:
        """Raise RecipeError unless this request asks for all of `before`, and perhaps for more.

        More rules, after or between those of before, more seeds and a control are more; anything
        else that differs is named with both values.
        """
        differ = _differences(before.recipe, self.recipe)
        common = [rule for rule in self.rules if rule in before.rules]
        if common != [*before.rules] or self.rules[0] != before.rules[0]:
            differ["rules"] = ",".join(before.rules), ",".join(self.rules)
        if self.seeds < before.seeds:
            differ["seeds"] = before.seeds, self.seeds
        if before.control is not None and self.control != before.control:
            differ["control"] = before.control, self.control
        if (self.tune, self.rates) != (before.tune, before.rates) and "local.lr" not in differ:
            differ["rates"] = before._rates(), self._rates()
        if differ:
            listed = "\n  ".join(f"{k}: was {a!r}, is {b!r}" for k, (a, b) in differ.items())
            raise RecipeError(
                f"{folder}: the comparison in it was begun with another request:\n  {listed}\n"
                "go on with it as it was (rules and seeds may be added): "
                f"polyrank resume {folder}; or choose another --out"
            )

    def _rates(self) -> str:
        listed = ", ".join(map(str, self.rates))
        return f"tuned over {listed}" if self.tune else f"not tuned: {listed}"


def _differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, with both values, as far as a comparison uses them."""
    old, new = flat(dataclasses.asdict(before)), flat(dataclasses.asdict(now))
    keys = [key for key in {**old, **new} if key not in _FREE]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
