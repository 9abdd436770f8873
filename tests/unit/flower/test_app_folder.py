import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyrank import config
from polyrank.cli import app
from polyrank.config.app import APP_KEYS, own_keys
from polyrank.config.client import read_client
from polyrank.config.flower import from_run_config, nested, to_run_config
from polyrank.config.reading import SHIPPED
from polyrank.errors import FolderExistsError, PolyrankError, RecipeError
from polyrank.flower.app_folder import CLIENT_FILES, project_name, write_app

RECIPES = list(SHIPPED.values())
SPLIT = SHIPPED["split"]
FOUR_TASKS = "".join(
    f'{{"task": "{task}", "instruction": "say", "input": "x", "output": "y"}}\n' for task in "abcd"
)


def tables(folder: Path) -> dict[str, dict]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_ours_becomes_an_app(path: Path, tmp_path: Path) -> None:
    recipe = config.read(path, ["control="])
    write_app(recipe, tmp_path / "new" / "app")
    found = tables(tmp_path / "new" / "app")
    expected = nested({**to_run_config(recipe), **APP_KEYS})
    assert found["tool"]["flwr"]["app"]["config"] == expected
    assert found["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "polyrank.flower.server_app:app",
        "clientapp": "polyrank.flower.client_app:app",
    }
    assert found["project"]["dependencies"] == []


def test_flower_takes_the_app_and_bundles_nothing_that_comes_to_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower = pytest.importorskip("flwr.common.config", reason="needs polyrank[flower]")
    from flwr.cli.build import build_fab_from_disk
    from flwr.supercore.run import Run

    recipe = config.read(SPLIT, ["data.source=client"])
    folder = tmp_path / "My app.2"
    write_app(recipe, folder)
    (folder / "client.toml").write_text('name = "secret"', encoding="utf-8")
    (folder / "data.jsonl").write_text("{}", encoding="utf-8")
    fab = build_fab_from_disk(folder)
    bundled = flower.get_fab_config(fab)
    assert bundled["project"]["name"] == "my-app-2"
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(fab)) as content:
        names = set(content.namelist())
    assert names == {"pyproject.toml", "README.md", ".info/CONTENT"}
    valid, errors, warnings = flower.validate_config(
        flower.get_project_config(folder), project_dir=folder
    )
    assert (valid, errors, warnings) == (True, [], [])
    given = flower.parse_config_args(
        ["local.lr=1e-3 rounds=5 app.wait=9.0", "fleet.types='{T1 = 4, T2 = 16}'"]
    )
    run = Run.create_empty(1)
    run.override_config = {**given, "fleet.distribution": "{T1 = 1.0}", "fleet.cuts": ""}
    fused = flower.get_fused_config_from_fab(fab, run)
    changed = from_run_config(fused)
    assert (changed.local.lr, changed.rounds) == (1e-3, 5)
    assert changed.fleet.types == {"T1": 4, "T2": 16}
    run.override_config = {}
    assert from_run_config(flower.get_fused_config_from_fab(fab, run)) == recipe


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("app", "app"),
        ("My App_2", "my-app-2"),
        ("2024", "app-2024"),
        ("…", "app"),
        ("-x-", "x"),
        ("a" * 31 + "-b", "a" * 31),
    ],
)
def test_a_name_that_flower_takes_comes_of_any_folder(folder: str, name: str) -> None:
    assert project_name(Path(folder)) == name


def test_a_name_is_that_of_the_folder_that_a_path_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert project_name(Path()) == project_name(tmp_path)


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    recipe = config.read(SPLIT)
    with pytest.raises(FolderExistsError):
        write_app(recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_local_sources_are_absolute_and_a_trace_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(FOUR_TASKS, encoding="utf-8")
    Path("trace.csv").write_text("round,client,type\n2,*,T1\n", encoding="utf-8")
    recipe = config.read(SPLIT, ["data.source=rows.jsonl", "fleet.trace=trace.csv"])
    write_app(recipe, Path("app"))
    Path("trace.csv").unlink()
    found = tables(Path("app"))["tool"]["flwr"]["app"]["config"]
    assert found["data"]["source"] == str(tmp_path / "rows.jsonl")
    assert found["fleet"]["trace"] == ""
    assert found["fleet"]["schedule"] == '{2 = {"*" = "T1"}}'


def test_a_pooled_run_is_no_app(tmp_path: Path) -> None:
    recipe = config.read(SPLIT, ["data.pooled=true", "fleet.cuts="])
    with pytest.raises(RecipeError, match=r"data\.pooled"):
        write_app(recipe, tmp_path / "app")
    assert not (tmp_path / "app").exists()


def test_an_awkward_name_does_not_break_the_file(tmp_path: Path) -> None:
    name = 'a "quoted"\n{name} \\ [x]'
    recipe = replace(config.read(SPLIT), name=name)
    write_app(recipe, tmp_path / "app")
    assert tables(tmp_path / "app")["tool"]["flwr"]["app"]["config"]["name"] == name
    assert name in tables(tmp_path / "app")["project"]["description"]


def test_data_that_is_here_and_cannot_be_divided_is_refused_before_a_folder_is_made(
    tmp_path: Path,
) -> None:
    for wrong, reason in (
        ("data.by=equal", "equal"),
        ('fleet.clients={somebody = "T1"}', r"fleet\.clients: \['somebody'\]"),
    ):
        with pytest.raises(PolyrankError, match=reason):
            write_app(config.read(SPLIT, [wrong]), tmp_path / "app")
        assert not (tmp_path / "app").exists()
    write_app(config.read(SPLIT, ["data.by=equal", "data.source=hub/set"]), tmp_path / "app")


def test_a_simulation_of_clients_with_their_own_data_names_their_files(tmp_path: Path) -> None:
    recipe = config.read(SHIPPED["across-machines"])
    told = "\n".join(write_app(recipe, tmp_path / "one").next)
    assert "num-supernodes=3 " in told
    assert f"""-c '{CLIENT_FILES}="/path/to/clients/*.toml"'""" in told
    own = own_keys([f"{CLIENT_FILES}=/data/*.toml"])
    written = write_app(recipe, tmp_path / "other", own=own)
    assert CLIENT_FILES not in "\n".join(written.next), "the app has it already"
    assert tables(written.path)["tool"]["flwr"]["app"]["config"]["app"]["client-files"]


def test_clients_with_their_own_data_get_an_example(tmp_path: Path) -> None:
    write_app(config.read(SPLIT), tmp_path / "one")
    write_app(config.read(SPLIT, ["data.source=client"]), tmp_path / "other")
    assert not (tmp_path / "one" / "client.example.toml").exists()
    client = read_client(tmp_path / "other" / "client.example.toml")
    assert client.name == "client-1"
    page = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "num-supernodes=4" in page
    assert "client.toml" not in page.partition("| key |")[0]
    page = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert "num-supernodes=N" in page
    assert "client.toml" in page.partition("| key |")[0]


def test_every_key_of_the_app_is_on_its_page(tmp_path: Path) -> None:
    write_app(config.read(SPLIT), tmp_path / "app")
    page = (tmp_path / "app" / "README.md").read_text(encoding="utf-8")
    assert [key for key in APP_KEYS if f"| `{key}` |" not in page] == []
    assert "{" not in page.replace("{T1 = 4, T2 = 16}", "")


def test_as_few_machines_are_simulated_as_there_are_clients(tmp_path: Path) -> None:
    recipe = config.read(
        SPLIT, ["data.by=iid", "data.clients=2", "fleet.distribution={T1 = 1.0}", "fleet.cuts="]
    )
    (first, *_) = write_app(recipe, tmp_path / "app").next
    assert "num-supernodes=2 " in first


def test_the_command_says_what_to_do_next_and_needs_no_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flwr", "grpc")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "grpc", None)
    folder = tmp_path / "app"
    arguments = ["app", str(SPLIT), str(folder), "rounds=2", "control=weakest"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "control = 'weakest' is left out" in done.output
    assert f"flwr run {folder} --stream --federation-config 'num-supernodes=4" in done.output
    found = tables(folder)["tool"]["flwr"]["app"]["config"]
    assert (found["rounds"], found["control"]) == (2, "")


def test_a_run_in_one_process_refuses_data_at_clients(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["run", str(SPLIT), "data.source=client", "--out", str(out)])
    assert isinstance(done.exception, RecipeError)
    assert "polyrank app" in str(done.exception)
    assert not out.exists()


def test_keys_of_the_app_itself_are_written_where_they_are_given(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    given = ["app.out=/data/run", "app.split.listen=0.0.0.0:9099", "app.split.address=me.example"]
    done = CliRunner().invoke(app, ["app", str(SPLIT), str(folder), *given, "app.wait=30"])
    assert done.exit_code == 0, done.output
    found = tables(folder)["tool"]["flwr"]["app"]["config"]["app"]
    assert (found["out"], found["wait"]) == ("/data/run", 30)
    assert found["split"]["listen"] == "0.0.0.0:9099"
    assert found["split"]["address"] == "me.example"
    assert found["clients"] == 0


@pytest.mark.parametrize(
    "wrong",
    ["app.outt=x", "app.wait=soon", "app.split.listen=0.0.0.0:1", "app.client-files=here/*.toml"],
)
def test_wrong_keys_of_the_app_are_refused_before_a_folder_is_made(
    tmp_path: Path, wrong: str
) -> None:
    done = CliRunner().invoke(app, ["app", str(SPLIT), str(tmp_path / "app"), wrong])
    assert isinstance(done.exception, RecipeError)
    assert not (tmp_path / "app").exists()
