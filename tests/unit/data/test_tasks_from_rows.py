"""Rows as examples: which column is what, and what is skipped."""

import pytest

from kit import kit_path
from polyrank.data import load_tasks, tasks_from_rows
from polyrank.errors import DataError, RecipeError

FULL = {"task": "t", "category": "c", "instruction": "Add.", "input": "1 2", "output": ["3", "III"]}


def test_the_default_layout():
    (example,) = tasks_from_rows([{**FULL, "unseen": True, "extra": {"deep": 1}}]).examples
    assert (example.prompt, example.input, example.references) == ("Add.", "1 2", ("3", "III"))
    assert example.columns["task"] == "t"
    assert example.columns["unseen"] == "true"
    assert "extra" not in example.columns


def test_a_source_with_input_alone_has_its_prompts_there():
    (example,) = tasks_from_rows([{"input": "q", "output": "a"}]).examples
    assert (example.prompt, example.input, example.references) == ("q", "", ("a",))


def test_format_strings_over_columns():
    row = {"meaning": "name: {x}", "text": "A place.", "n": 3}
    (example,) = tasks_from_rows(
        [row], prompt="Put {{this}} {n}: {meaning}", completion=" {text}"
    ).examples
    assert example.prompt == "Put {this} 3: name: {x}"
    assert example.references == (" A place.",)


def test_a_named_prompt_leaves_the_input_column_out_unless_it_is_named_too():
    assert tasks_from_rows([FULL], prompt="instruction").examples[0].input == ""
    assert tasks_from_rows([FULL], prompt="task", input="input").examples[0].input == "1 2"


def test_unusable_rows_are_named_and_the_others_keep_their_numbers():
    rows = [
        {"instruction": " ", "input": None, "output": "a"},
        {"instruction": "q", "input": "", "output": []},
        {"instruction": "q", "output": ["", "a", None]},
        {"instruction": "q", "output": "\n"},
        {"output": "a"},
        {"instruction": "\ud800", "output": "a"},
        {"instruction": "", "input": "only input", "output": 0},
    ]
    tasks = tasks_from_rows(rows)
    assert [(e.row, e.references) for e in tasks.examples] == [(2, ("a",)), (6, ("0",))]
    assert tasks.skipped.rows == {
        "empty prompt": ["row 0", "row 4"],
        "no completion": ["row 1", "row 3"],
        "text that is not Unicode": ["row 5"],
    }
    assert tasks.skipped.count == 5
    assert str(tasks.skipped).startswith("2 empty prompt (row 0, row 4); 2 no completion")


def test_a_missing_column_is_an_error_that_lists_the_columns():
    with pytest.raises(DataError, match="no column 'answer'; the columns are task, category, inst"):
        tasks_from_rows([FULL], completion="answer")
    with pytest.raises(DataError, match=r"no column 'meaninng', which 'a \{meaninng\}' asks for"):
        tasks_from_rows([FULL], prompt="a {meaninng}")
    with pytest.raises(DataError, match="no column 'output'; the columns are text"):
        tasks_from_rows([{"text": "a"}], prompt="text")


@pytest.mark.parametrize("value", [{"a": 1}, True, [["a"]], b"x", ["a", {"b": 1}]])
def test_a_cell_of_the_wrong_type_names_row_and_column(value):
    with pytest.raises(DataError, match=r"rows, row 1: .*column 'output'"):
        tasks_from_rows([FULL, {**FULL, "output": value}])


def test_a_prompt_cannot_be_a_list():
    with pytest.raises(DataError, match="row 0: expected one text in a prompt, got a list of 2"):
        tasks_from_rows([FULL], prompt="output")


def test_nothing_usable_is_an_error_that_says_why():
    with pytest.raises(DataError, match=r"not one usable example: 1 no completion \(row 0\)"):
        tasks_from_rows([{"input": "q", "output": ""}])
    with pytest.raises(DataError, match="it has no rows"):
        tasks_from_rows([])


@pytest.mark.parametrize("text", ["{", "{}", "{a!r}", "{a:>3}", "{a} }", "{{a}}"])
def test_a_format_string_that_cannot_be_is_a_recipe_error(text):
    with pytest.raises(RecipeError, match="format string"):
        tasks_from_rows([{"a": "x", "output": "y"}], prompt=text)


def test_limit_keeps_the_first_rows(tmp_path):
    (tmp_path / "a.txt").write_text("a|b\nc|d\ne|f\n")
    tasks = load_tasks(tmp_path / "a.txt", separator="|", limit=2)
    assert [example.prompt for example in tasks.examples] == ["a", "c"]
    with pytest.raises(RecipeError, match="at least 1 row, got 0"):
        load_tasks(tmp_path / "a.txt", separator="|", limit=0)


@pytest.mark.kit
def test_every_set_of_the_kit_loads():
    tasks = load_tasks(kit_path("natural_instructions", "tasks.jsonl.gz"))
    assert len({example.columns["task"] for example in tasks.examples}) == 125
    assert tasks.skipped.count == 0
    pairs = load_tasks(kit_path("e2e_nlg", "train.txt.gz"), separator="||", limit=42060)
    assert len(pairs.examples) == 42060
    dolly = load_tasks(
        kit_path("dolly", "dolly15k.jsonl.gz"),
        prompt="instruction",
        input="context",
        completion="response",
    )
    assert len(dolly.examples) + dolly.skipped.count == 15011
    bank = load_tasks(kit_path("banking77", "test.jsonl.gz"), prompt="text", completion="label")
    assert len(bank.examples) == 3080
    for name in ("sst-2", "agnews", "rte"):
        assert load_tasks(kit_path("classification", f"{name}_test.jsonl.gz")).examples
    table = load_tasks(
        kit_path("e2e_nlg", "orig_devset.csv.gz"), prompt="mr", completion="ref", limit=100
    )
    assert table.examples[0].prompt.startswith("name[")
