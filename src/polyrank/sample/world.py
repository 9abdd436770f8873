"""The miniature world: invented people, ordinary things, and facts about both drawn by seed."""

import random
from dataclasses import dataclass

from polyrank.sample import words

PEOPLE = 112
LARGEST = 200
LARGEST_SUM = 60


@dataclass(frozen=True)
class World:
    """All facts that the pretraining text may state and the tasks may ask for.

    A relation is a mapping from subject to value: ``relations["colour"]["lamp"] == "green"``.
    """

    things: list[str]
    people: list[str]
    relations: dict[str, dict[str, str]]


def _names(count: int, rng: random.Random) -> list[str]:
    """Invent ``count`` distinct names of two or three open syllables, none an English word here."""
    onsets, vowels = (*"bdfgklmnprstvz", "th", "sh"), "aeiou"
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = rng.choice((2, 3, 3))
        name = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables))
        names[name.capitalize() + rng.choice(("", "n", "l"))] = None
    return list(names)


def _plural(word: str) -> str:
    """Return the regular English plural."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word if word == "shears" else word + "es"
    return word + "s"


def build(seed: int = 0) -> World:
    """Draw the world of one seed; equal seeds give equal worlds."""
    rng = random.Random(f"world {seed}")
    kind_of = {thing: kind for kind, row in words.KINDS.items() for thing in row.split()}
    things = sorted(kind_of)
    people = _names(PEOPLE, rng)
    relations: dict[str, dict[str, str]] = {"kind": kind_of}
    for name, row in words.THING_VALUES.items():
        relations[name] = _deal(things, row.split(), rng)
    for name, row in words.PERSON_VALUES.items():
        relations[name] = _deal(people, row.split(), rng)
    relations["opposite"] = {}
    for left, right in words.pairs(words.OPPOSITES):
        relations["opposite"] |= {left: right, right: left}
    relations["past"] = dict(words.pairs(words.PAST))
    irregular = dict(words.pairs(words.IRREGULAR_PLURALS))
    relations["plural"] = {thing: _plural(thing) for thing in things} | irregular
    numbers = range(1, LARGEST)
    relations["successor"] = {str(n): str(n + 1) for n in numbers}
    relations["predecessor"] = {str(n): str(n - 1) for n in numbers}
    relations["double"] = {str(n): str(2 * n) for n in range(1, LARGEST // 2 + 1)}
    return World(things, people, relations)


def _deal(subjects: list[str], values: list[str], rng: random.Random) -> dict[str, str]:
    """Give values to subjects at random and as evenly as possible."""
    shuffled = [values[i % len(values)] for i in range(len(subjects))]
    rng.shuffle(shuffled)
    return dict(zip(subjects, shuffled, strict=True))
