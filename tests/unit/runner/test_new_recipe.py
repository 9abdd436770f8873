import csv
import json
from pathlib import Path

import pytest

from polyrank import config
from polyrank.errors import FolderExistsError, RecipeError
from polyrank.runner.new_recipe import write_recipe

ROWS = [
    {"question": f"What is {i} plus {i}?", "answer": str(2 * i), "site": "abc"[i % 3], "id": i}
    for i in range(60)
]


def jsonl(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_the_sample_is_taken_by_its_tasks(tmp_path: Path) -> None:
    made = write_recipe(tmp_path / "my.toml")
    recipe = config.read(made.path)
    assert (recipe.name, recipe.model.source, recipe.data.source) == ("my", "sample", "sample")
    assert (recipe.data.prompt, recipe.data.input, recipe.data.completion, recipe.data.by) == (
        "instruction",
        "input",
        "output",
        "task",
    )
    assert made.path.read_text(encoding="utf-8").startswith("#:schema file:///")


def test_columns_are_told_by_their_names_and_clients_get_equal_shares(tmp_path: Path) -> None:
    data = jsonl(tmp_path, ROWS)
    recipe = config.read(write_recipe(tmp_path / "my.toml", data=str(data), clients=6).path)
    assert (recipe.data.prompt, recipe.data.completion) == ("question", "answer")
    assert (recipe.data.by, recipe.data.clients) == ("iid", 6)
    clients = recipe.clients()
    assert [len(clients[id].examples) for id in clients.seen] == [10] * 6
    assert sum(recipe.fleet_of(clients).counts().values()) == 6


def test_a_column_that_tells_owners_is_proposed_and_an_id_is_none(tmp_path: Path) -> None:
    data = jsonl(tmp_path, [{**row, "client": row["id"]} for row in ROWS])
    recipe = config.read(write_recipe(tmp_path / "my.toml", data=str(data)).path)
    assert (recipe.data.by, recipe.data.clients) == ("site", None)
    assert {*recipe.clients().seen} == {"a", "b", "c"}


def test_csv_files_and_columns_of_other_names_are_taken_as_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frage", "antwort", "klinik"])
        writer.writerows([f"Wie viel ist {i}?", i, i % 2] for i in range(40))
    told = {"prompt": "frage", "completion": "antwort", "by": "klinik"}
    recipe = config.read(write_recipe(tmp_path / "my.toml", data=str(path), **told).path)
    assert (recipe.data.prompt, recipe.data.completion, recipe.data.by) == (*told.values(),)
    with pytest.raises(RecipeError, match=r"\['frage', 'antwort', 'klinik'\], do not tell"):
        write_recipe(tmp_path / "other.toml", data=str(path), clients=2)


def test_a_source_is_named_as_the_recipe_s_folder_sees_it(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    data = jsonl(tmp_path, ROWS)
    path = write_recipe(tmp_path / "recipes" / "my.toml", data=str(data), clients=2).path
    assert 'source = "../rows.jsonl"' in path.read_text(encoding="utf-8")
    assert config.read(path).data.source == str(data)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "hospital"}, r"--by: .* has no column 'hospital'; it has \['question'"),
        ({"by": "site", "clients": 3}, "every value of 'site' is a client, and there are 3"),
        ({"prompt": "ask", "clients": 2}, "--prompt: .* has no column 'ask'"),
        ({"clients": 61}, "too few for 61 clients"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    tmp_path: Path, given: dict[str, object], said: str
) -> None:
    data = jsonl(tmp_path, ROWS)
    with pytest.raises(Exception, match=said):
        write_recipe(tmp_path / "my.toml", data=str(data), **given)  # type: ignore[arg-type]
    assert not (tmp_path / "my.toml").exists()


def test_without_a_column_of_owners_a_number_of_clients_is_asked_for(tmp_path: Path) -> None:
    data = jsonl(tmp_path, [{"question": "a?", "answer": "b", "id": i} for i in range(9)])
    with pytest.raises(RecipeError, match="--clients 6, or the column"):
        write_recipe(tmp_path / "my.toml", data=str(data))


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(FolderExistsError, match="not overwritten"):
        write_recipe(path)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no folder"):
        write_recipe(tmp_path / "none" / "my.toml")
