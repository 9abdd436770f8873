"""The tasks of the miniature: what its world states, asked for in instruction form.

Five categories ask for what the pretraining text states in other forms. The sixth, ``signals``,
asks for a code that no pretraining text mentions: each colour is signalled by a food, and only the
clients' own examples tell which.
"""

import random
from typing import Any

from polyrank.sample import text, words
from polyrank.sample.world import World

EXAMPLES = 120
INSTRUCTIONS = ("Name the {relation} of this {noun}.", "Give only the {relation} of the {noun}.")

# category -> (noun of the input, relations of the seen tasks, relation of the unseen task)
CATEGORIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "things": ("thing", ("colour", "material", "maker"), "shape"),
    "words": ("word", ("opposite", "plural", "past"), "kind"),
    "numbers": ("number", ("successor", "predecessor", "sum"), "double"),
    "rows": ("row", ("first", "last", "reverse"), "second"),
    "scenes": ("scene", ("giver", "gift", "place"), "receiver"),
    "signals": ("row", ("first", "last", "reverse"), "second"),
}


def signals() -> dict[str, str]:
    """Return the code: the food that signals each colour."""
    colours = words.THING_VALUES["colour"].split()
    return dict(zip(colours, words.PERSON_VALUES["food"].split(), strict=False))


def _signal(relation: str, rng: random.Random) -> tuple[str, str]:
    """Return a row of three colours and the signal for one or all of them."""
    code = signals()
    colours = rng.sample(sorted(code), 3)
    parts = text.row_parts([code[colour] for colour in colours])
    return ", ".join(colours), parts[relation]


def _case(world: World, category: str, relation: str, rng: random.Random) -> tuple[str, str]:
    """Return one input of a task and its answer."""
    if category == "signals":
        return _signal(relation, rng)
    return text.case(world, relation, rng)


def _cases(world: World, category: str, relation: str, rng: random.Random) -> dict[str, str]:
    """Return up to ``EXAMPLES`` distinct inputs of a task with the answer to each."""
    cases: dict[str, str] = {}
    limit = min(EXAMPLES, len(world.relations.get(relation, range(EXAMPLES))))
    while len(cases) < limit:
        source, answer = _case(world, category, relation, rng)
        cases[source] = answer
    return cases


def examples(world: World, seed: int = 0) -> list[dict[str, Any]]:
    """Return every example of every task as the records of ``tasks.jsonl``."""
    rng = random.Random(f"tasks {seed}")
    records: list[dict[str, Any]] = []
    for category, (noun, seen, unseen) in CATEGORIES.items():
        for relation in (*seen, unseen):
            asked = f"signal for the {relation}" if category == "signals" else relation
            for source, answer in _cases(world, category, relation, rng).items():
                instruction = rng.choice(INSTRUCTIONS).format(relation=asked, noun=noun)
                records.append(
                    {
                        "task": f"{category}_{relation}",
                        "category": category,
                        "instruction": instruction,
                        "input": source,
                        "output": [answer],
                        "unseen": relation == unseen,
                    }
                )
    return records
