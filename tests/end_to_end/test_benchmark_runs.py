"""Held-out sources in whole runs: from the files that a recipe names to summary and table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import runs
from kit import kit_path
from runs import RECIPE, lines_with, polyrank, write_recipe

HELD_OUT = """
[benchmark]
validation = "held-out.jsonl"
test = "asked.jsonl"
examples = 5
generate = 3
max_new_tokens = 2
"""


def write_sources(folder: Path) -> None:
    """A validation source of eight rows, and a test source of four inputs, two references each."""
    rows = [{"instruction": "w90", "input": f"w{4 + i}", "output": f"w{4 + i}"} for i in range(8)]
    asked = [
        {"instruction": "w91", "input": f"w{50 + i // 2}", "output": f"w{50 + i} w{4 + i}"}
        for i in range(8)
    ]
    for name, written in (("held-out.jsonl", rows), ("asked.jsonl", asked)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in written))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a benchmark in run/, what it printed, and its recipe."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_sources(folder)
    recipe = write_recipe(folder, "target_perplexity = 1e6\n" + RECIPE + HELD_OUT)
    done = polyrank("run", recipe, "--out", folder / "run")
    assert done.code == 0, done.err
    (folder / "out.txt").write_text(done.out, encoding="utf-8")
    (folder / "err.txt").write_text(done.err, encoding="utf-8")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_summary_has_the_scores_before_and_after(place: Path) -> None:
    summary = read(place / "run" / "summary.json")
    for when in ("base", "final"):
        found = summary["benchmark"][when]
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert (found["examples"], found["generated"]) == (8, 3)
        assert 0 <= found["bleu"] <= 100
        assert found["nist"] >= 0
        assert 0 <= found["rouge_l"] <= 1
    assert summary["benchmark"]["base"]["loss"] != summary["benchmark"]["final"]["loss"]


def test_rounds_are_measured_on_the_rows_drawn_for_them_and_reach_the_target(place: Path) -> None:
    lines = (place / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [one["benchmark"]["examples"] for one in records] == [5, 5]
    spent = read(place / "run" / "summary.json")["to_target_perplexity"]
    assert spent["rounds"] == 1
    assert spent["bytes"] == records[0]["bytes_up"] + records[0]["bytes_down"]


def test_the_texts_can_be_read_and_scored_by_others(place: Path) -> None:
    for name in ("base.json", "evaluation.json"):
        texts = read(place / "run" / name)["benchmark"]["texts"]
        assert len(texts) == 3
        assert all(one["prompt"] == "w91" for one in texts)
        assert len({one["input"] for one in texts}) == 3
        assert all(isinstance(one["text"], str) for one in texts)


def test_the_terminal_tells_the_perplexity(place: Path) -> None:
    told = (place / "err.txt").read_text(encoding="utf-8")
    assert told.count("on the benchmark") == 2
    out = (place / "out.txt").read_text(encoding="utf-8")
    assert lines_with(out, "validation (8)", "perplexity")
    assert lines_with(out, "test (3)", "BLEU")
    assert "target perplexity 1e+06 was reached after 1 round," in " ".join(out.split())


def test_a_changed_source_is_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    write_sources(tmp_path)
    recipe = write_recipe(tmp_path, RECIPE + HELD_OUT)
    assert polyrank("run", recipe, "rounds=1", "--out", tmp_path / "run").code == 0
    with (tmp_path / "held-out.jsonl").open("a") as file:
        file.write('{"instruction": "w90", "input": "w60", "output": "w61"}\n')
    written = tmp_path / "run" / "recipe.toml"
    more = written.read_text(encoding="utf-8").replace("rounds = 1", "rounds = 2")
    written.write_text(more, encoding="utf-8")
    done = polyrank("resume", tmp_path / "run")
    assert done.code != 0
    assert "settings.benchmark.data" in done.err


def test_a_comparison_has_a_table_of_it(place: Path) -> None:
    asked = ("--rules", "fedit,flora", "--seeds", "2", "--out", place / "both")
    done = polyrank("compare", place / "tiny.toml", *asked)
    assert done.code == 0, done.err
    assert lines_with(done.out, "perplexity", "BLEU", "NIST", "ROUGE-L")
    found = read(place / "both" / "compare.json")
    assert found["benchmark"] == {"target": 1e6}
    for method in found["methods"]:
        each = [
            read(place / "both" / run["folder"] / "summary.json")["benchmark"]["final"]
            for run in method["runs"]
        ]
        assert method["benchmark"]["mean"]["perplexity"] == pytest.approx(
            sum(one["perplexity"] for one in each) / 2
        )
        assert method["benchmark"]["reached"] == 2
    assert "**benchmark, sources of no client" in (place / "both" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("", "target_perplexity: needs the perplexity between the rounds"),
        ('[benchmark]\nvalidation = "held-out.jsonl"\nevery = 0\n', "target_perplexity: needs"),
        ("[benchmark]\nevery = 2\n", "benchmark: give validation, test, or both"),
        ('[benchmark]\ntest = "asked.jsonl"\n', "target_perplexity: needs"),
        ('[benchmark]\nvalidation = "gone.jsonl"\n', "gone.jsonl: there is no such file"),
        ('[benchmark]\nvalidations = "x"\n', "did you mean benchmark.validation?"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_run(
    section: str, message: str, tmp_path: Path
) -> None:
    write_sources(tmp_path)
    text = f"target_perplexity = 5.0\n{runs.RECIPE}\n{section}"
    done = polyrank("run", write_recipe(tmp_path, text), "--out", tmp_path / "run")
    assert done.code != 0
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.kit
def test_the_official_test_part_of_e2e_has_630_inputs_with_all_their_references() -> None:
    from models import tiny_loaded
    from polyrank import config

    kit_path("e2e_nlg", "test.txt.gz")
    recipe = config.read("e2e", ["benchmark.generate=0"])
    assert recipe.benchmark is not None
    # Words are unknown to this tokenizer: it is the grouping of rows that is looked at.
    made = recipe.benchmark_of(tiny_loaded("llama", max_position_embeddings=512))
    assert made is not None
    assert (len(made.validation), len(made.cases)) == (4672, 630)
    assert sum(len(case.references) for case in made.cases) == 4693
    first = made.cases[0]
    assert first.prompt == "name : Blue Spice | Type : coffee shop | area : city centre"
    assert first.references[0] == "A coffee shop in the city centre area called Blue Spice ."
    assert first.references[1] == "Blue Spice is a coffee shop in city centre ."
