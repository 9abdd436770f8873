"""What a recipe may say of data where every client brings its own."""

from __future__ import annotations

from polyrank.config.inputs import DataSection
from polyrank.errors import RecipeError

DEALING = ("by", "clients", "alpha", "on", "unseen", "min_examples", "pooled")
"""Keys of [data] that deal one source out to clients."""

READING = ("split", "subset", "revision", "format", "prompt", "input", "completion", "separator")
"""Keys of [data] that say how a source is read."""


def check_own(data: DataSection, *, benchmark: bool) -> None:
    """Raise RecipeError for keys that have no meaning where clients bring their own data.

    `benchmark`: the recipe has one, whose sources are read as this section says.
    """
    if not data.at_clients:
        return
    here = dict.fromkeys(DEALING, "every client has its own data, whole")
    if not benchmark:
        here |= dict.fromkeys(READING, "each client.toml says it")
    for key, instead in here.items():
        if getattr(data, key) != DataSection.model_fields[key].default:
            raise RecipeError(
                f"data.{key}: has no meaning with data.source = 'client'; leave it out: {instead}"
            )
