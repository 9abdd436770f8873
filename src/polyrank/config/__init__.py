"""Recipes: TOML files that say everything about a run, checked before anything is loaded."""

from polyrank.config.reading import parse, read
from polyrank.config.recipe import Recipe
from polyrank.config.sections import SAMPLE

__all__ = ["SAMPLE", "Recipe", "parse", "read"]
