import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from polyrank import config
from polyrank.config import Recipe
from polyrank.config.client import ClientSettings, OwnData, read_client
from polyrank.config.data import PARTITIONING, READING, DataSection
from polyrank.config.keys import keys_of
from polyrank.config.recipe import cores
from polyrank.config.reference import client_page
from polyrank.data import Clients
from polyrank.errors import DataError, RecipeError
from polyrank.planning import DEVICES
from polyrank.sample import TASKS

ROOT = Path(__file__).parents[3]
ROWS = [json.loads(line) for line in TASKS.read_text(encoding="utf-8").splitlines()]
RARE = [row for row in ROWS if not row["unseen"]]
NAMES = sorted({row["task"] for row in RARE})[:3]


def recipe_of(**sections: Any) -> Recipe:
    given: dict[str, Any] = {"model": {"source": "sample"}, "data": {"source": "client"}}
    return config.parse({**given, "fleet": {"distribution": "uniform"}, **sections})


def written(folder: Path, content: Mapping[str, Any]) -> Path:
    path = folder / "client.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    return path


def client_of(folder: Path, name: str, **sections: Any) -> ClientSettings:
    """A client with the sample's rows of one task, in a file beside its client.toml."""
    own = "".join(f"{json.dumps(row)}\n" for row in RARE if row["task"] == name)
    (folder / "own.jsonl").write_text(own, encoding="utf-8")
    content = {"name": name, "data": {"source": "own.jsonl"}, **sections}
    return read_client(written(folder, content))


def mistake(folder: Path, content: Mapping[str, Any]) -> str:
    path = written(folder, content)
    with pytest.raises(RecipeError) as caught:
        read_client(path)
    assert str(caught.value).startswith(f"client {path}: ")
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "fractions"), [(0, [0.8, 0.1, 0.1]), (7, [0.5, 0.3, 0.2])])
def test_a_client_has_the_rows_that_it_has_where_all_data_is_together(
    tmp_path: Path, name: str, seed: int, fractions: list[float]
) -> None:
    union = recipe_of(seed=seed, data={"source": "sample", "fractions": fractions}).clients()[name]
    recipe = recipe_of(seed=seed, data={"source": "client", "fractions": fractions})
    own = client_of(tmp_path, name).clients(recipe)
    assert [*own] == [name]
    assert own[name].seen
    assert own.hash() == Clients([union]).hash()
    assert len(own[name].train) > len(own[name].test) > 0
    for part in ("train", "validation", "test"):
        texts = [(e.prompt, e.input, e.references) for e in getattr(own[name], part)]
        assert texts == [(e.prompt, e.input, e.references) for e in getattr(union, part)]


def test_the_split_goes_by_the_clients_name(tmp_path: Path) -> None:
    recipe = recipe_of()
    one, other = client_of(tmp_path, NAMES[0]), client_of(tmp_path, NAMES[0])
    renamed = replace(other, name="another")
    assert one.clients(recipe)[NAMES[0]].test != renamed.clients(recipe)["another"].test


def test_the_category_is_the_owners_or_the_columns(tmp_path: Path) -> None:
    (column,) = {row["category"] for row in RARE if row["task"] == NAMES[0]}
    recipe = recipe_of()
    client = client_of(tmp_path, NAMES[0])
    assert client.clients(recipe)[NAMES[0]].category == column
    own = replace(client, category="mine")
    assert own.clients(recipe)[NAMES[0]].category == "mine"


@pytest.mark.parametrize(("own", "common", "kept"), [(12, 20, 12), (20, 12, 12), (12, None, 12)])
def test_the_lower_of_the_limits_holds(
    tmp_path: Path, own: int, common: int | None, kept: int
) -> None:
    client = client_of(tmp_path, NAMES[0], data={"source": "own.jsonl", "limit": own})
    recipe = recipe_of(data={"source": "client", **({"limit": common} if common else {})})
    assert len(client.clients(recipe)[NAMES[0]].examples) == kept


def test_columns_are_the_clients_own(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("q;a\nx;1\ny;2\nz;3\n".replace(";", ","), encoding="utf-8")
    data = {"source": "own.csv", "prompt": "ask {q}", "completion": "a"}
    path = written(tmp_path, {"name": "c", "data": data})
    examples = read_client(path).clients(recipe_of())["c"].examples
    assert {(e.prompt, e.references) for e in examples} == {
        ("ask x", ("1",)),
        ("ask y", ("2",)),
        ("ask z", ("3",)),
    }


def test_files_are_seen_from_the_folder_of_client_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        (folder / "own.jsonl").write_text("", encoding="utf-8")
    (there / "base").mkdir()
    monkeypatch.chdir(here)
    content = {"name": "a", "data": {"source": "own.jsonl"}, "model": {"source": "base"}}
    client = read_client(written(there, content))
    assert client.data.source == str(there / "own.jsonl")
    assert client.model.source == str(there / "base")


def test_data_that_is_missing_is_said_when_it_is_loaded(tmp_path: Path) -> None:
    client = read_client(written(tmp_path, {"name": "a", "data": {"source": "none.jsonl"}}))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        client.clients(recipe_of())


def test_model_device_and_threads_are_the_machines_own(tmp_path: Path) -> None:
    base = {"source": "hub/model", "revision": "v1", "device": "cuda:1", "dtype": "bfloat16"}
    recipe = recipe_of(model=base, engine={"threads": 3})
    plain, own = client_of(tmp_path, "a"), {"source": "/base", "device": "cpu", "threads": 2}
    assert plain.model_of(recipe) == replace(recipe.model, device="auto")
    assert plain.threads(recipe) == 3
    assert plain.threads(recipe_of()) == cores()
    changed = client_of(tmp_path, "a", model=own)
    section = changed.model_of(recipe)
    assert (section.source, section.revision) == ("/base", None)
    assert (section.device, section.dtype) == ("cpu", "bfloat16")
    assert changed.threads(recipe) == 2


def test_a_device_is_a_known_one_with_what_is_said_beside_it(tmp_path: Path) -> None:
    device = {"profile": "l4", "memory": "6 GiB", "up": "8 Mbit/s"}
    profile = client_of(tmp_path, "a", device=device).profile("bfloat16")
    assert profile is not None
    assert (profile.name, profile.memory_bytes, profile.up) == ("a", 6 * 2**30, 1e6)
    assert profile.flops == 121e12  # At bfloat16; 30.3e12 at float32.
    assert client_of(tmp_path, "a").profile() is None
    named = client_of(tmp_path, "a", device={"profile": "l4"}).profile()
    assert named is not None
    assert named.memory_bytes == DEVICES["l4"].memory_bytes


def test_the_limits_are_the_terms_that_the_server_is_told(tmp_path: Path) -> None:
    limits = {
        "largest_rank": 8,
        "lowest_cut": 2,
        "labels_may_leave": False,
        "smallest_count": 5,
    }
    terms = client_of(tmp_path, "a", limits=limits).limits
    assert {key: getattr(terms, key) for key in limits} == limits
    default = client_of(tmp_path, "a").limits
    assert (default.largest_rank, default.lowest_cut) == (None, None)
    assert default.labels_may_leave
    assert default.smallest_count == 1


GOOD: dict[str, Any] = {"name": "a", "data": {"source": "x"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nam": "b"}, "nam: unknown key; did you mean name?"),
        ({"zebra": 1}, "zebra: unknown key; a client.toml has name, category, data, model"),
        ({"data": {}}, "data.source: missing; a client.toml must have the key data.source"),
        ({"data": {"source": "x", "by": "iid"}}, "data.by: unknown key; [data] has source"),
        ({"data": {"source": ""}}, "data.source: expected a file, a folder or a data set"),
        ({"data": {"source": "x", "limit": 0}}, "data.limit: expected at least 1, got 0"),
        ({"limits": {"largest_rank": 0}}, "limits.largest_rank: expected at least 1, got 0"),
        ({"limits": {"labels_may_leave": 1}}, "expected true or false, got 1"),
        ({"limits": {"smallest_count": -1}}, "smallest_count: expected at least 0, got -1"),
        ({"name": " "}, "name: expected 1 to 200 printable characters, got ' '"),
        ({"name": "a\nb"}, "name: expected 1 to 200 printable characters, got 'a\\nb'"),
        ({"name": "a" * 201}, "name: expected 1 to 200 printable characters"),
        ({"device": {"profile": "jetson-nano-8gb"}}, "did you mean 'jetson-orin-nano-8gb'?"),
        ({"device": {"up": 5}}, "device.memory: missing"),
        ({"device": {"memory": 5, "up": "5 GB"}}, "device.up: unknown unit 'GB'"),
        ({"device": {"memory": 0}}, "device.memory: expected a whole number of bytes above zero"),
        ({"device": {"memory": True}}, 'expected bytes, or a text such as "6 GiB", got true'),
        ({"model": {"threads": -1}}, "model.threads: expected at least 0, got -1"),
    ],
)
def test_a_mistake_is_named_with_its_file(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    assert said in mistake(tmp_path, {**GOOD, **change})


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, {"name": 3, "data": {"sorce": "x"}, "limits": {"lowest_cut": 0}})
    with pytest.raises(RecipeError) as caught:
        read_client(path)
    lines = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == ["name", "data.source", "data.sorce", "limits.lowest_cut"]


@pytest.mark.parametrize(("text", "said"), [("name = ", "not valid TOML"), (None, "No such file")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "client.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        read_client(path)


def test_every_key_of_data_is_the_recipes_or_the_clients() -> None:
    shared = {"fractions", "template", "max_length", "loss_on", "too_long"}
    both = {"source", "limit"}
    assert {*PARTITIONING, *READING} | shared | both == {*keys_of(DataSection)}
    assert {*READING} | both == {*keys_of(OwnData)}


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """Made by ``python -m polyrank.config.reference client > docs/reference/client.md``."""
    assert (ROOT / "docs" / "reference" / "client.md").read_text(encoding="utf-8") == client_page()


def test_the_example_on_the_page_can_be_read(tmp_path: Path) -> None:
    _, _, rest = client_page().partition("```toml\n")
    path = tmp_path / "client.toml"
    path.write_text(rest.partition("```")[0], encoding="utf-8")
    client = read_client(path)
    profile = client.profile()
    assert client.limits.lowest_cut == 2
    assert profile is not None
    assert profile.up == 20e6 / 8
