"""Recipes: TOML files that say everything about a run, checked before anything is loaded."""

from polyrank.config.data import CLIENT
from polyrank.config.reading import parse, read
from polyrank.config.recipe import Recipe
from polyrank.sample import SAMPLE

__all__ = ["CLIENT", "SAMPLE", "Recipe", "parse", "read"]
