"""One client's examples in three parts."""

import pytest

from polyrank.data import Example, split

SHARES = (0.8, 0.1, 0.1)


def examples(*prompts):
    return [Example(prompt, (f"{row}",), row) for row, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, (0, 0, 0)),
        (1, (1, 0, 0)),
        (2, (1, 0, 1)),
        (3, (1, 1, 1)),
        (10, (8, 1, 1)),
        (14, (12, 1, 1)),
        (15, (11, 2, 2)),
        (150, (120, 15, 15)),
    ],
)
def test_sizes(count, expected):
    parts = split(examples(*map(str, range(count))), SHARES, 0, "a")
    assert tuple(map(len, parts)) == expected


def test_a_share_of_zero_stays_empty():
    ten = examples(*"abcdefghij")
    assert tuple(map(len, split(ten, (1.0, 0.0, 0.0), 0, "a"))) == (10, 0, 0)
    assert tuple(map(len, split(ten, (0.5, 0.5, 0.0), 0, "a"))) == (5, 5, 0)
    assert tuple(map(len, split(ten[:2], (0.5, 0.5, 0.0), 0, "a"))) == (1, 1, 0)


def test_the_same_question_stays_in_one_part():
    train, validation, test = split(examples(*"aabbccddee" * 3), SHARES, 0, "a")
    kept = [{example.prompt for example in part} for part in (train, validation, test)]
    assert all(kept)
    assert sum(len(prompts) for prompts in kept) == 5


def test_questions_that_differ_in_their_input_are_different():
    same = [Example("q", ("a",), row, input=str(row)) for row in range(10)]
    assert tuple(map(len, split(same, SHARES, 0, "a"))) == (8, 1, 1)


def test_one_question_alone_is_training():
    assert tuple(map(len, split(examples(*"aaaaa"), SHARES, 0, "a"))) == (5, 0, 0)


def test_a_large_group_of_one_question_goes_to_training_when_smaller_ones_can_be_drawn():
    for seed in range(5):
        parts = split(examples(*"a" * 50, *"bcdefghijk"), SHARES, seed, "a")
        assert {example.prompt for example in parts[0]} >= {"a"}
        assert tuple(map(len, parts)) == (50, 4, 6)


def test_seed_and_client_change_the_split_the_order_of_the_source_does_not():
    ten = examples(*"abcdefghij")
    test = split(ten, SHARES, 0, "a")[2]
    assert any(split(ten, SHARES, seed, "a")[2] != test for seed in range(9))
    assert any(split(ten, SHARES, 0, name)[2] != test for name in "abcdefgh")
    assert split(ten[::-1], SHARES, 0, "a")[2] == test
