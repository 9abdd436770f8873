"""A client's examples divided into training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence

from polyrank.data.sequences import select
from polyrank.data.types import Example
from polyrank.errors import RecipeError
from polyrank.seeds import derive

Fractions = tuple[float, float, float]


def check_fractions(fractions: Sequence[float]) -> Fractions:
    """Return (training, validation, test); RecipeError unless they are shares that sum to one."""
    if len(fractions) != 3 or not all(0 <= share <= 1 for share in fractions):
        raise RecipeError(
            "fractions: expected three shares (training, validation, test) from 0 to 1, got "
            f"{list(fractions)}"
        )
    if fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
        raise RecipeError(
            f"fractions: expected a sum of 1 with a part for training, got {list(fractions)}"
        )
    return fractions[0], fractions[1], fractions[2]


def split(
    examples: Sequence[Example], fractions: Fractions, seed: int, client: str
) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """Return the training, validation and test part, each in the order of the source.

    Examples that ask the same (prompt and input) stay in one part. The order in which they are
    drawn comes from a hash of seed, client and what is asked, so other clients have no influence,
    nor has the order of the source. A part with a share above 0 gets at least one example when
    there are three different prompts; with two there is no validation part, with one all is
    training.
    """
    # By the hash of what is asked, not by the texts, which may be more than memory should hold.
    groups: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        asked = derive(seed, client, "split", example.prompt, example.input)
        groups.setdefault(asked, []).append(place)

    shares = {"test": fractions[2], "validation": fractions[1]}
    wanted = [name for name, share in shares.items() if share > 0][: max(len(groups) - 1, 0)]
    drawn: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    left = sorted(groups)
    for waiting, name in zip(range(len(wanted), 0, -1), wanted, strict=True):
        target = max(1, round(shares[name] * len(examples)))
        sizes = [len(groups[asked]) for asked in left]
        taken = set(_draw(sizes, target, len(left) - waiting))
        drawn[name] = [place for i in taken for place in groups[left[i]]]
        left = [asked for i, asked in enumerate(left) if i not in taken]
    drawn["train"] = [place for asked in left for place in groups[asked]]
    train, validation, test = (select(examples, sorted(places)) for places in drawn.values())
    return train, validation, test


def _draw(sizes: Sequence[int], target: int, most: int) -> list[int]:
    """Return which groups to take for about `target` examples, in order, but 1 … `most`.

    A group that would exceed the target is passed over; if every one would, the smallest is taken.
    """
    taken: list[int] = []
    count = 0
    for index, size in enumerate(sizes):
        if len(taken) < most and count + size <= target:
            taken.append(index)
            count += size
    return taken or [min(range(len(sizes)), key=lambda index: sizes[index])]
