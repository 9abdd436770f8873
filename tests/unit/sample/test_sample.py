"""The embedded files are what their program makes, and the code book can be learnt together."""

import json
from pathlib import Path

import pytest

from polyrank.sample import CODES, TASKS, codes, tasks, world

MADE = {TASKS: lambda: tasks.examples(world.build(0), 0), CODES: lambda: codes.examples(0)}


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_the_file_is_what_the_program_makes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == MADE[path]()


def test_code_words_are_unique() -> None:
    code = codes.book()
    assert len(code) == len(set(code.values())) == codes.ENTRIES
    assert not set(code) & set(code.values())


def test_no_client_has_the_whole_book_and_together_they_have_it() -> None:
    taught: set[str] = set()
    asked: set[str] = set()
    halves: dict[str, set[str]] = {}
    for record in codes.examples():
        assert record["output"] == [codes.book()[record["input"]]]
        halves.setdefault(record["task"], set()).add(record["input"])
        (asked if record["unseen"] else taught).add(record["input"])
    assert len(halves) == codes.TRAINING_CLIENTS + codes.HELD_OUT_CLIENTS
    assert {len(half) for half in halves.values()} == {codes.ENTRIES // 2}
    assert asked <= taught == set(codes.book())
