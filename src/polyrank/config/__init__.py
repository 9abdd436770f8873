"""Recipes: TOML files that say everything about a run, checked before anything is loaded."""

from polyrank.config.model_and_data import CLIENT, SAMPLE
from polyrank.config.reading import parse, read
from polyrank.config.recipe import Recipe

__all__ = ["CLIENT", "SAMPLE", "Recipe", "parse", "read"]
