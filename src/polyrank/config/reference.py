"""The page docs/recipes.md, made from the sections: ``python -m polyrank.config.reference``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polyrank.config.mistakes import subsection, words
from polyrank.config.recipe import Recipe
from polyrank.config.section import Section

HEAD = """\
# Recipes: every key

A recipe is a TOML file that says everything about a run. `[model]`, `[data]` and `[fleet]` must be
there; everything else has a default. Types are strict: a whole number does for a number, a number
in quotes does not. Unknown keys are errors that name the nearest known one.

`polyrank run RECIPE key=value …` changes keys for one run: `local.lr=1e-3`,
`fleet.distribution=heavy-tail-light`, `'fleet.types={T1 = 4, T2 = 16}'`; `control=` (nothing behind
the sign) takes a key back to its default. Of `local.epochs` and `local.steps`, `sampling.fraction`
and `sampling.number`, `fleet.distribution` and `fleet.clients`, a recipe gives one; an override of
one takes the other back. The recipe as it was carried out, defaults written out, lies in the run's
folder as `recipe.toml`.

The recipes in `recipes/` are worked examples. This page is made from the code by
`python -m polyrank.config.reference`.
"""

_QUOTED = re.compile(r"'([^' ]*)'")


def page() -> str:
    """Return the page as Markdown."""
    sections = [
        (name, inner)
        for name, field in Recipe.model_fields.items()
        if (inner := subsection(field)) is not None
    ]
    parts = [HEAD, "## At the top\n", *_table(Recipe)]
    for name, section in sections:
        parts += [
            f"\n## [{name}]\n",
            f"{inspect.cleandoc(section.__doc__ or '')}\n",
            *_table(section),
        ]
    return "\n".join(parts) + "\n"


def _table(section: type[Section]) -> Iterator[str]:
    yield "| key | takes | default | |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if subsection(field) is None:
            meaning = " ".join((field.description or "").split())
            takes = _QUOTED.sub(r"`\1`", words(field)).replace("|", "\\|")
            yield f"| `{name}` | {takes} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**must be given**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "–"


if __name__ == "__main__":
    print(page(), end="")
