"""The code book: everyday words with a code word each, which the base cannot know.

Every client holds examples of half of the book, so that nobody can learn all of it alone. The book
is a table from words to words without a rule behind it: an adapter of low rank learns it slowly.
"""

import random
from typing import Any

from polyrank.sample import words
from polyrank.sample.tasks import INSTRUCTIONS

ENTRIES = 30
TRAINING_CLIENTS, HELD_OUT_CLIENTS = 12, 4
NAMES = ("code", "sign", "mark")
"""What a code word is called in instructions; with two forms of instruction, six wordings."""


def book(seed: int = 0) -> dict[str, str]:
    """Return the code word of every word, drawn by seed."""
    values = (*words.PERSON_VALUES.values(), *words.THING_VALUES.values())
    entries = [word for row in values for word in row.split() if word.islower()][:ENTRIES]
    codes = " ".join(words.KINDS.values()).split()[:ENTRIES]
    random.Random(f"book {seed}").shuffle(codes)
    return dict(zip(entries, codes, strict=True))


def examples(seed: int = 0) -> list[dict[str, Any]]:
    """Return the examples of every client as the records of ``codes.jsonl``.

    A client has half of the entries in every wording, and the client after it the other half.
    Held-out clients have halves too: what they ask for is taught by those that train.
    """
    rng = random.Random(f"codes {seed}")
    code = book(seed)
    wordings = [form.format(relation=name, noun="word") for form in INSTRUCTIONS for name in NAMES]
    records: list[dict[str, Any]] = []
    entries = sorted(code)
    for number in range(TRAINING_CLIENTS + HELD_OUT_CLIENTS):
        if number % 2 == 0:  # This client and the next share the book between them.
            rng.shuffle(entries)
        half = entries[number % 2 :: 2]
        asked = [(word, wording) for word in half for wording in wordings]
        rng.shuffle(asked)
        records += [
            {
                "task": f"reader_{number + 1:02}",
                "category": "codes",
                "instruction": wording,
                "input": word,
                "output": [code[word]],
                "unseen": number >= TRAINING_CLIENTS,
            }
            for word, wording in asked
        ]
    return records
