"""The ranks Q that an allocation chooses from; a recipe calls them `plan.levels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from polyrank.errors import RecipeError


def checked_rank_choices(choices: Sequence[int], place: str = "plan.levels") -> tuple[int, ...]:
    """Return Q as given.

    Raises RecipeError, naming `place`, if it is empty, holds something else than whole numbers of
    at least 1, or is not strictly rising.
    """
    expected = "expected ranks of at least 1, rising, each once, such as [1, 2, 4, 8]"
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence):
        raise RecipeError(f"{place}: {expected}; got {choices!r}")
    if not choices:
        raise RecipeError(f"{place}: {expected}; got none. Leave the key out to have them derived")
    for level in choices:
        if isinstance(level, bool) or not isinstance(level, int) or level < 1:
            raise RecipeError(f"{place}: {expected}; got {level!r} in {list(choices)}")
    for lower, upper in pairwise(choices):
        if lower == upper:
            raise RecipeError(f"{place}: {expected}; got {lower} twice in {list(choices)}")
        if lower > upper:
            raise RecipeError(f"{place}: {expected}; got {lower} before {upper} in {list(choices)}")
    return tuple(choices)


def derived_rank_choices(
    budgets: Sequence[int], unit: Mapping[str, int], limit: Mapping[str, int]
) -> tuple[int, ...]:
    """Return Q for a fleet whose clients have these bytes for adapters: powers of two [I].

    1, 2, 4, … up to the first that would use up the richest budget if every site had it (or what
    its limit allows), and not above the largest limit.

    - Powers of two: each divides the next, so that filling by gain per byte is exact where all
      sites cost alike (`allocate`); log₂ many, so that the ranks of a fleet stay few and its
      clients share work; and a step never more than doubles a site.
    - From 1: the poorest client affords 1 somewhere if it affords any rank at all, so that no
      client is shut out by Q.
    - Up to about the rank that the richest client affords everywhere: with a smaller top, it could
      not spend its budget; with a larger one, every client would spend its own on fewer sites,
      since the objective Σ gain·rank has no diminishing returns. The top of Q is what sets how
      concentrated plans are: poor clients fill few sites to the top. The paper leaves Q open
      (arXiv 2505.02795 [S]), and this is its weak point: give `levels` yourself to decide
      otherwise, e.g. a smaller top for plans that spread wider.

    Raises RecipeError without any budget or site.
    """
    if not budgets or not unit:
        raise RecipeError(
            "plan.levels: cannot be derived without a client and a site; give them, e.g. [1, 2, 4]"
        )
    allowed = max(limit[site] for site in unit)
    choices = [1]
    while _everywhere(choices[-1], unit, limit) < max(budgets) and 2 * choices[-1] <= allowed:
        choices.append(2 * choices[-1])
    return tuple(choices)


def _everywhere(rank: int, unit: Mapping[str, int], limit: Mapping[str, int]) -> int:
    """Bytes of a rank at every site, or of what the site's limit allows."""
    return sum(cost * min(rank, limit[site]) for site, cost in unit.items())
