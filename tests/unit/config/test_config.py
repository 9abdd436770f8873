import dataclasses
import tomllib
from pathlib import Path

import pytest

from polyrank import config
from polyrank.config import Recipe
from polyrank.config.keys import all_keys
from polyrank.config.reading import PAIRS, SHIPPED
from polyrank.errors import RecipeError
from polyrank.planning import CutPoint
from polyrank.run import RunSettings
from polyrank.training import LocalTraining
from polyrank.training.split import SplitSettings

MINIMAL = """
[model]
source = "sample"
[data]
source = "sample"
[fleet]
distribution = "uniform"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        config.read(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("local.lrr=1", "local.lrr: unknown key; did you mean local.lr?"),
        ("locl.lr=1", "locl: unknown key; did you mean local?"),
        ("lr=1", "lr: unknown key; did you mean local.lr?"),
        (
            "batch=1",
            "batch: unknown key; did you mean local.batch or evaluation.batch or benchmark.batch?",
        ),
        ("faults.zebra=1", "faults.zebra: unknown key; [faults] has quorum, attempts, max_"),
        ("rounds=5.0", "rounds: expected a whole number, got 5.0"),
        ("rounds=true", "rounds: expected a whole number, got true"),
        ("local.lr=true", "local.lr: expected a number, got true"),
        ("local.lr=fast", "local.lr: expected a number, got the string 'fast'"),
        ("seed=007", "seed: expected a whole number, got the string '007'; leave the quotes out"),
        ("model.checkpointing='true'", "expected true or false, got the string 'true'; leave the"),
        ("model.dtype=float16", "one of 'float32', 'bfloat16', 'float64', got the string 'float16"),
        ("model.sites=3", "model.sites: expected a string or a list of strings, got 3"),
        ("model.exclude=q_proj", "model.exclude: expected a list of strings, got the string"),
        ("model.groups={a='b'}", "model.groups: expected a table of lists of strings, got"),
        ("engine.cohort=some", "engine.cohort: expected 'auto' or a whole number, got the string"),
        ("data.fractions=[0.5]", "data.fractions: expected a list of three numbers, got the list"),
        ("fleet.types={T1='x'}", "fleet.types: expected a family's name or a table, e.g."),
        ("fleet.clients={a=1}", "fleet.clients: expected a table of strings, got the table"),
        ("data=3", "data: expected a section, got 3"),
        ("data.source=", "data.source: missing; a recipe must have the key data.source"),
        ("early_stopping.min_delta=1", "early_stopping.patience: missing"),
        ("rounds=0", "rounds: expected at least 1, got 0"),
        ("name=1979-05-27", "name: expected a string, got datetime.date(1979, 5, 27)"),
        ("fleet.clients={a=1979-05-27}", "fleet.clients: expected a table of strings, got"),
        ("local.betas=[0.9]", "local.betas: expected a list of two numbers, got the list [0.9]"),
        ("local.lr=inf", "local.lr: expected a finite number, got inf"),
        ("target_loss=nan", "target_loss: expected a finite number, got nan"),
        # Values that only the domain can judge.
        ("local.lr=-1", "local.lr: expected more than 0, got -1"),
        ("local.steps=0", "local.steps"),
        ("sampling.fraction=2", "sampling.fraction: expected more than 0, at most 1, got 2"),
        ("aggregation.rule=flexlor", "did you mean 'flexlora'?"),
        ("aggregation.split=diagonal", "diagonal"),
        ("aggregation.weights=capped", "aggregation.weights = 'capped' needs aggregation.cap"),
        ("lora.alpha=-1", "lora.alpha: expected more than 0, got -1"),
        ("fleet.distribution=unifrm", "'unifrm' is not a resource distribution; there are"),
        ("fleet.distribution={T1=0.5}", "sum to 1"),
        ("fleet.distribution={T9=1.0}", "no LoRA type ['T9']"),
        ("fleet.distribution=", "give either distribution"),
        ("fleet.types=papr", "'papr' is not a family of LoRA types"),
        ("fleet.force=T9", "fleet.force: expected weakest or one of ['T1', 'T2', 'T3', 'T4'], got"),
        ("control=strongest", "control: expected weakest or one of ['T1', 'T2', 'T3', 'T4']"),
        ("engine.deterministic=true engine.cohort=4", "deterministic trains one client at a time"),
        ("rounds", "override 'rounds': expected key=value"),
        ("=5", "override '=5': expected key=value"),
        ("local..lr=5", "override 'local..lr=5': expected key=value"),
        (
            "fleet.cuts={T9=1}",
            "fleet.cuts: no LoRA type ['T9']; there are ['T1', 'T2', 'T3', 'T4']",
        ),
        ("fleet.cuts={T1=0}", "fleet.cuts.T1: cut: expected at least 1 block at the client"),
        ("fleet.cuts={T1=[3,3]}", "an upper cut above the lower one; got 3–3"),
        ("fleet.cuts={T1=[1,2,3]}", "fleet.cuts.T1: cut: expected a number of blocks or, for"),
        ("fleet.cuts={T1=[]}", "fleet.cuts.T1: cut: expected a number of blocks or, for"),
        ("fleet.cuts={T1=2.0}", "fleet.cuts: expected a table of blocks by type, e.g. {T1 = 2, T2"),
        ("fleet.cuts={T1=true}", "fleet.cuts: expected a table of blocks by type"),
        ("fleet.cuts=2", "fleet.cuts: expected a table of blocks by type, e.g."),
        ("fleet.cuts.T1=two", "fleet.cuts: expected a table of blocks by type"),
        ("split.wire=fp16", "split.wire: expected one of 'float32', 'bf16', 'int8', 'float64'"),
        ("split.adapters=each", "split.adapters: expected one of 'own', 'shared', got the string"),
        ("split.in_flight=0", "split.in_flight: expected at least 1, got 0"),
        ("split.clip=0.0", "split.clip: expected more than 0, got 0.0"),
        ("split.noise=-1", "split.noise: expected at least 0, got -1"),
        ("rounds.x=5 rounds.x.y=5", "override 'rounds.x.y=5': x is a value, not a section"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected_and_what_came(
    minimal: Path, override: str, said: str
) -> None:
    message = mistake(minimal, *override.split())
    assert said in message
    assert message.count("\n") == 0


def test_all_mistakes_are_told_at_once(minimal: Path) -> None:
    message = mistake(minimal, "rounds=x", "local.lrr=1", "model.sites=3")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "rounds",
        "model.sites",
        "local.lrr",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = ", "not valid TOML"),
        ("rounds = 1\n", "data: missing; a recipe must have the section [data]"),
        (MINIMAL + "[local]\nepochs = 1\nsteps = 2\n", "local: give epochs or steps, not both"),
        (MINIMAL + "[sampling]\nfraction = 1\nnumber = 2\n", "give fraction or number, not both"),
        (MINIMAL + '[fleet.clients]\na = "T1"\n', "give distribution or clients, not both"),
        (MINIMAL + "[fleet.typs]\na = 1\n", "fleet.typs: unknown key; did you mean fleet.types?"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text, encoding="utf-8")
    message = mistake(path)
    assert said in message
    assert str(path) in message


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in mistake(tmp_path / "none.toml")
    assert "expected a TOML file, got a folder" in mistake(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    assert "not valid TOML" in mistake(tmp_path / "latin.toml")


def test_overrides_take_toml_bare_strings_and_tables(minimal: Path) -> None:
    recipe = config.read(
        minimal,
        [
            "local.lr=1",
            "name=a name = with signs",
            "control=weakest",
            'data.by="iid"',
            "data.clients = 3",
            "fleet.types={T1 = 4, T2 = {attention = 4, feed-forward = 8}}",
            "fleet.distribution={T1 = 0.5, T2 = 0.5}",
        ],
    )
    assert recipe.local.lr == 1
    assert recipe.name == "a name = with signs"
    assert recipe.control == "weakest"
    assert (recipe.data.by, recipe.data.clients) == ("iid", 3)
    fleet = recipe.fleet.build(["a", "b"], seed=0)
    assert fleet.types["T1"].ranks == {"all": 4}
    assert fleet.types["T2"].ranks == {"attention": 4, "feed-forward": 8}


def test_cuts_and_what_split_training_asks_for_reach_the_run(minimal: Path) -> None:
    overrides = ["fleet.cuts={T1=1, T3=[1, 3]}", "split.wire=int8", "split.noise=0.5"]
    recipe = config.read(minimal, [*overrides, "fleet.cuts.T2=2"])
    cuts = {"T1": CutPoint(1), "T3": CutPoint(1, 3), "T2": CutPoint(2)}
    assert recipe.fleet.build("abcd", seed=0).cuts == cuts
    table = config.read(minimal, [*overrides, "fleet.cuts.T2=2", "fleet.clients={a='T1'}"])
    assert table.fleet.build("a", seed=0).cuts == cuts
    assert recipe.run_settings().split == SplitSettings("int8", noise=0.5)
    assert config.read(minimal).fleet.build("abcd", seed=0).cuts == {}


def test_an_override_makes_a_section_that_the_file_lacks(minimal: Path) -> None:
    recipe = config.read(minimal, ["early_stopping.patience=2", "sampling.number=3"])
    assert recipe.early_stopping is not None
    assert recipe.early_stopping.patience == 2
    assert recipe.sampling.number == 3


def test_an_empty_override_takes_a_key_back(minimal: Path) -> None:
    minimal.write_text("control = 'weakest'\nrounds = 3\n" + MINIMAL, encoding="utf-8")
    recipe = config.read(minimal, ["control=", "rounds=", "local.lr="])
    assert (recipe.control, recipe.rounds, recipe.local.lr) == (None, 10, 3e-4)


def test_an_override_of_one_of_a_pair_takes_the_other_back(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "[local]\nsteps = 2\n[sampling]\nnumber = 2\n", encoding="utf-8")
    changes = ["local.epochs=0.5", "sampling.fraction=1", "fleet.clients={a='T1'}"]
    recipe = config.read(minimal, changes)
    assert (recipe.local.epochs, recipe.local.steps) == (0.5, None)
    assert (recipe.sampling.fraction, recipe.sampling.number) == (1, None)
    assert (recipe.fleet.clients, recipe.fleet.distribution) == ({"a": "T1"}, None)


def test_the_pairs_are_keys() -> None:
    known = {key for key, _ in all_keys(Recipe)}
    assert {key for pair in PAIRS for key in pair} <= known


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["local.steps=3", "local.clip=0", "control=T1", "target_loss=2", "data.unseen=['a']"],
        ["fleet.cuts={T1=1, T2=[1, 3]}", "split.clip=2.0"],
        ["fleet.types={T1=4}", "fleet.clients={a='T1'}", "model.groups={attention=['q']}"],
        ["early_stopping.patience=2", "engine.cohort=3", "data.unseen=0.25", "model.sites=['q']"],
    ],
)
def test_a_recipe_written_and_read_again_is_the_same(
    minimal: Path, tmp_path: Path, overrides: list[str]
) -> None:
    recipe = config.read(minimal, overrides)
    (tmp_path / "again.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert config.read(tmp_path / "again.toml") == recipe


def test_sources_beside_the_recipe_win_over_those_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        folder.mkdir()
        (folder / "tasks.jsonl").touch()
    (here / "base").mkdir()
    monkeypatch.chdir(here)
    path = recipes / "r.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    text = MINIMAL.replace('"sample"', '"base"', 1).replace('"sample"', '"tasks.jsonl"')
    path.write_text(text, encoding="utf-8")
    recipe = config.read(path)
    assert recipe.data.source == str(recipes / "tasks.jsonl")
    assert recipe.model.source == str(here / "base")
    assert config.read(path, ["data.source=tasks.jsonl"]).data.source == str(here / "tasks.jsonl")
    assert config.read(path, ["model.source=owner/name"]).model.source == "owner/name"


def test_defaults_are_those_of_the_python_api(minimal: Path) -> None:
    recipe = config.read(minimal)
    assert recipe.local == LocalTraining()
    assert recipe.run_settings() == RunSettings()


def test_the_resolved_recipe_says_how_many_threads(minimal: Path) -> None:
    assert config.read(minimal).resolved().engine.threads >= 1
    assert config.read(minimal, ["engine.threads=3"]).resolved().engine.threads == 3


def test_the_control_differs_in_the_fleet_alone(minimal: Path) -> None:
    recipe = config.read(minimal, ["control=weakest"])
    before, forced = dataclasses.asdict(recipe), dataclasses.asdict(recipe.forced("weakest"))
    assert forced.pop("fleet") == before.pop("fleet") | {"force": "weakest"}
    assert before.pop("control") == "weakest"
    assert forced.pop("control") is None
    assert forced == before


def test_clients_of_a_table_must_be_in_the_data(minimal: Path) -> None:
    fleet = config.read(minimal, ["fleet.clients={a='T1', zebra='T2'}"]).fleet
    with pytest.raises(RecipeError, match=r"\['zebra'\] are no training clients"):
        fleet.build(["a", "b"], seed=0)


def test_toml_of_a_recipe_is_toml(minimal: Path) -> None:
    assert tomllib.loads(config.read(minimal).to_toml())["fleet"]["distribution"] == "uniform"


def test_a_name_is_a_file_or_else_a_recipe_that_comes_with_polyrank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.read("quickstart", ["rounds=2"]).name == "quickstart"
    (tmp_path / "quickstart").write_text(f'name = "mine"\n{MINIMAL}', encoding="utf-8")
    assert config.read("quickstart").name == "mine"


@pytest.mark.parametrize("name", ["quickstrat", "recipes/quickstart.toml", "mine.toml"])
def test_an_unknown_recipe_is_told_which_there_are(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no such file.*") as told:
        config.read(name)
    assert ", ".join(SHIPPED) in str(told.value)
    assert ("did you mean quickstart?" in str(told.value)) == ("quick" in name)
