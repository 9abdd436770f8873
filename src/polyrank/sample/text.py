"""The pretraining text: declarative paragraphs, records and tables about the miniature world.

Nothing here asks or orders: there is no question, no imperative, and no marker of the prompt
template. What a task asks for is stated somewhere in this text, in other forms.
"""

import random
from collections.abc import Iterator

from polyrank.sample import words
from polyrank.sample.world import LARGEST_SUM, World

STATEMENTS: dict[str, tuple[str, ...]] = {
    "colour": ("The {s} is {v}.", "The {s} has been painted {v}."),
    "material": ("The {s} is made of {v}.", "Somebody used {v} for the {s}."),
    "maker": ("The {s} was made by {v}.", "{v} made the {s}."),
    "shape": ("The {s} looks {v}.", "Seen from afar the {s} is {v}."),
    "kind": ("The {s} is a {v}.", "Every {s} is some {v}."),
    "craft": ("{s} is a {v}.", "{s} works as a {v}."),
    "town": ("{s} lives in {v}.", "The house of {s} stands in {v}."),
    "food": ("{s} likes to eat {v}.", "{s} has {v} for dinner."),
    "pet": ("{s} has the {v}.", "The {v} lives with {s}."),
    "opposite": ("What is {s} is not {v}.", "{s} and {v} are opposites."),
    "plural": ("One {s}, two {v}.", "Here is a {s} and there are many {v}."),
    "past": ("Today they {s}, yesterday they {v}.", "We {s} as we {v} before."),
    "successor": ("After {s} comes {v}.", "One more than {s} is {v}."),
    "predecessor": ("Before {s} comes {v}.", "One less than {s} is {v}."),
    "double": ("Twice {s} is {v}.", "{s} and {s} make {v}."),
}
THING_RELATIONS = ("colour", "material", "maker", "shape", "kind")
PERSON_RELATIONS = ("craft", "town", "food", "pet")
WORD_RELATIONS = ("opposite", "plural", "past", "successor", "predecessor", "double")
ROW_RELATIONS = ("first", "second", "last", "reverse")
SCENE_RELATIONS = ("giver", "receiver", "gift", "place")
RELATIONS = (
    *THING_RELATIONS,
    *PERSON_RELATIONS,
    *WORD_RELATIONS,
    *ROW_RELATIONS,
    *SCENE_RELATIONS,
    "sum",
)
SCENE_VERBS = ("gave", "sold", "lent", "showed", "sent")


def scene(world: World, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Return one sentence about a gift and who and what plays which part in it."""
    giver, receiver = rng.sample(world.people, 2)
    gift = rng.choice(world.things)
    place = rng.choice(sorted(set(world.relations["town"].values())))
    verb = rng.choice(SCENE_VERBS)
    parts = {"giver": giver, "receiver": receiver, "gift": gift, "place": place}
    if rng.random() < 0.5:
        return f"In {place} {giver} {verb} the {gift} to {receiver}.", parts
    return f"{giver} {verb} {receiver} the {gift} in {place}.", parts


def row_parts(items: list[str]) -> dict[str, str]:
    """Return what can be said of a row."""
    backwards = ", ".join(reversed(items))
    return {"first": items[0], "second": items[1], "last": items[-1], "reverse": backwards}


def row(world: World, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Return a row of three or four words of one sort and its parts."""
    sorts = (world.things, world.things, *(row.split() for row in words.PERSON_VALUES.values()))
    items = rng.sample(rng.choice(sorts), rng.choice((3, 3, 4)))
    return ", ".join(items), row_parts(items)


def sum_pair(rng: random.Random) -> tuple[str, str]:
    """Return two numbers as ``"a, b"`` and their sum."""
    total = rng.randint(2, LARGEST_SUM)
    first = rng.randint(1, total - 1)
    return f"{first}, {total - first}", str(total)


def _statement(world: World, relation: str, subject: str, rng: random.Random) -> str:
    """State one fact, half the time in words that fit every relation."""
    value = world.relations[relation][subject]
    is_thing = relation in THING_RELATIONS
    if rng.random() < 0.5:
        return rng.choice(STATEMENTS[relation]).format(s=subject, v=value)
    the = "the " if is_thing else ""
    general = (
        f"The {relation} of {the}{subject} is {value}.",
        f"As {relation} of {the}{subject} we write {value}.",
        f"The {relation}, for {the}{subject}, is {value}.",
    )
    return rng.choice(general)


def _about_subject(world: World, rng: random.Random) -> str:
    """Tell some facts about one thing or person, as prose or as a record."""
    if rng.random() < 0.75:
        subject, relations = rng.choice(world.things), list(THING_RELATIONS)
    else:
        subject, relations = rng.choice(world.people), list(PERSON_RELATIONS)
    chosen = rng.sample(relations, rng.randint(2, len(relations)))
    if rng.random() < 0.4:
        lines = [f"{name}: {world.relations[name][subject]}" for name in chosen]
        return "\n".join([subject, *lines])
    return " ".join(_statement(world, name, subject, rng) for name in chosen)


def _about_words(world: World, rng: random.Random) -> str:
    """State facts of one or several relations between words or numbers."""
    relation = rng.choice(WORD_RELATIONS)
    subjects = rng.choices(sorted(world.relations[relation]), k=rng.randint(3, 5))
    return " ".join(_statement(world, relation, subject, rng) for subject in subjects)


def _group(world: World, rng: random.Random) -> str:
    """List subjects that share a value."""
    relation = rng.choice(THING_RELATIONS + PERSON_RELATIONS)
    table = world.relations[relation]
    value = rng.choice(sorted(set(table.values())))
    members = [subject for subject, own in table.items() if own == value]
    chosen = rng.sample(members, min(len(members), rng.randint(2, 4)))
    return f"With {relation} {value}: {', '.join(chosen)}."


def _count(_: World, rng: random.Random) -> str:
    """Count up or down, or add."""
    if rng.random() < 0.5:
        pairs = [sum_pair(rng) for _ in range(rng.randint(3, 5))]
        parts = [(*pair.split(", "), total) for pair, total in pairs]
        if rng.random() < 0.5:
            return " ".join(f"{a} plus {b} is {total}." for a, b, total in parts)
        return " ".join(f"The sum of {a} and {b} is {total}." for a, b, total in parts)
    start, length = rng.randint(1, 180), rng.randint(4, 10)
    numbers = [str(n) for n in range(start, start + length)]
    return ", ".join(numbers if rng.random() < 0.6 else numbers[::-1]) + "."


def _about_row(world: World, rng: random.Random) -> str:
    """Describe one row of things."""
    items, parts = row(world, rng)
    said = [
        f"The first is {parts['first']}.",
        f"The second is {parts['second']}.",
        f"The last is {parts['last']}.",
        f"In reverse it is {parts['reverse']}.",
    ]
    rng.shuffle(said)
    return f"Here is a row: {items}. " + " ".join(said[: rng.randint(2, 4)])


def _about_scene(world: World, rng: random.Random) -> str:
    """Tell one scene and name its parts, in prose or as a record."""
    sentence, parts = scene(world, rng)
    names = rng.sample(sorted(parts), rng.randint(2, 4))
    if rng.random() < 0.5:
        return "\n".join([sentence, *(f"{name}: {parts[name]}" for name in names)])
    return " ".join([sentence, *(f"The {name} is {parts[name]}." for name in names)])


def case(world: World, relation: str, rng: random.Random) -> tuple[str, str]:
    """Return something the relation applies to, and the answer."""
    if relation in world.relations:
        source = rng.choice(sorted(world.relations[relation]))
        return source, world.relations[relation][source]
    if relation == "sum":
        return sum_pair(rng)
    source, parts = (row if relation in ROW_RELATIONS else scene)(world, rng)
    return source, parts[relation]


def _ledger(world: World, rng: random.Random) -> str:
    """Write one to three entries of a ledger whose labels and marks are its own.

    The variety teaches the base that what is noted depends on the relation and the source and not
    on the words and marks between them. No label is a word of the prompt template.
    """
    *labels, last = rng.sample(words.LABELS.split(), 4)
    colon = rng.choice((":", ":", " -", " =", " >", ""))
    gap = rng.choice((" ", "\n", "\n"))
    between = rng.choice(("\n", "\n\n", "; ", " | ", ". ", ", "))
    about = rng.choice(("{}", "the {}", "{} of it", "this is the {}", "here the {} of a thing"))
    source_first = rng.random() < 0.3
    entries = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        relation = rng.choice(RELATIONS)
        source, answer = case(world, relation, rng)
        fields = [about.format(relation), source]
        heads = [label + colon + gap for label in labels]
        parts = [head + field for head, field in zip(heads, fields, strict=False)]
        parts = parts[::-1] if source_first else parts
        entries.append(between.join([*parts, heads[2] + answer]))
    return "\n".join([*entries, f"end of {last}"])


def _table(world: World, rng: random.Random) -> str:
    """Write a table of one relation: a heading, then one line for each source."""
    heading = rng.choice(RELATIONS)
    lines = [": ".join(case(world, heading, rng)) for _ in range(rng.randint(2, 4))]
    return "\n".join([heading, *lines])


_PARAGRAPHS = {
    "subject": _about_subject,
    "words": _about_words,
    "group": _group,
    "count": _count,
    "row": _about_row,
    "scene": _about_scene,
    "table": _table,
    "ledger": _ledger,
}
# Facts first; then mostly what has to be read off the text before it.
KNOWING = dict(zip(_PARAGRAPHS, (20, 7, 2, 6, 14, 14, 16, 20), strict=True))
READING = dict(zip(_PARAGRAPHS, (8, 4, 1, 8, 24, 24, 14, 17), strict=True))


def paragraphs(world: World, mixture: dict[str, int], seed: int) -> Iterator[str]:
    """Yield paragraphs without end, each sort as often as ``mixture`` says."""
    rng = random.Random(f"text {seed}")
    kinds, weights = list(mixture), list(mixture.values())
    while True:
        yield _PARAGRAPHS[rng.choices(kinds, weights)[0]](world, rng)
