"""Baselines by name, run and compared on a tiny model."""

import json
from pathlib import Path

import pytest

from polyrank.algebra import Dense
from polyrank.runner.inspect import adapter_of
from runs import adapter_bytes, lines_with, polyrank, widest, write_recipe

QUICK = ("rounds=2", "evaluation.generate=0", "local.lr=1e-2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    rules = "flexlora,cenlora,ft,fedlora"
    done = polyrank("compare", recipe, *QUICK, "--rules", rules, "--seeds", "1", "--out", out)
    assert done.code == 0, done.err
    return out, done


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_a_comparison_takes_baselines_beside_rules_on_the_same_clients_and_budget(compared):
    out, done = compared
    found = json.loads((out / "compare.json").read_text())
    methods = {one["label"]: one for one in found["methods"]}
    assert [*methods] == ["flexlora", "cenlora", "ft", "fedlora"]
    assert [one["same"] for one in found["agreement"]] == [True]
    assert {
        label: (one["rule"], one["force"], one["pooled"]) for label, one in methods.items()
    } == {
        "flexlora": ("flexlora", None, False),
        "cenlora": ("fedit", None, True),
        "ft": ("full", None, True),
        "fedlora": ("fedit", "weakest", False),
    }
    base = found["base"]["per_seed"][0]["seen"]["loss"]
    for one in methods.values():
        assert one["mean"]["seen"]["loss"] < base
        pairs = one["difference"]
        assert pairs is None or pairs["per_seed"][0]["seen"]["loss"]["clients"] == 4
        assert pairs is None or pairs["per_seed"][0]["unseen"]["loss"]["clients"] == 2
    assert "in one place, so nothing is sent: cenlora, ft" in " ".join(done.out.split())
    assert widest(done.out) <= 100


def test_a_pooled_round_sees_as_many_examples_as_a_federated_one(compared):
    """Two of four clients take part, with two steps each; one client of four steps stands for both.

    All rows here have the same length, so tokens tell the examples.
    """
    out, _ = compared
    runs = {
        name: records(out / name / "lr-0.01" / "seed-0") for name in ("fedlora", "cenlora", "ft")
    }
    for round in range(2):
        federated, *pooled = (run[round] for run in runs.values())
        assert len(federated["clients"]) == 2
        for one in pooled:
            assert one["clients"] == ["everyone"]
            assert one["tokens"] == federated["tokens"]


def test_a_run_of_full_fine_tuning_resumes_inspects_and_exports_whole(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = (*QUICK, "baseline=ft")
    done = polyrank("run", recipe, *settings, "--out", whole)
    assert done.code == 0, done.err
    assert lines_with(done.err, "ft in")
    assert lines_with(done.err, "pooled: the training examples of all 4 clients in one place")
    assert polyrank("run", recipe, *settings, "rounds=1", "--out", parts).code == 0
    text = (parts / "recipe.toml").read_text()
    (parts / "recipe.toml").write_text(text.replace("rounds = 1\n", "rounds = 2\n"))
    done = polyrank("resume", parts)
    assert done.code == 0, done.err
    assert adapter_bytes(parts) == adapter_bytes(whole)
    assert {type(delta) for delta in adapter_of(whole).factors.values()} == {Dense}
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["method"], summary["adapter_lost"] > 0) == ("full, pooled", True)
    fleet = json.loads((whole / "fleet.json").read_text())
    assert [*fleet["ranks"]] == ["T2"], "the strongest type trains"
    assert [*fleet["clients"]] == ["task0", "task1", "task2", "task3"], "these are measured"
    assert polyrank("inspect", whole).code == 0
    assert polyrank("export", whole, tmp_path / "merged", "--merged").code == 0
    exported = polyrank("export", whole, tmp_path / "cut", "--rank", "2")
    assert exported.code == 0, exported.err


def test_splitlora_runs_and_is_compared_with_federated_lora_on_the_same_clients(recipe, tmp_path):
    out = tmp_path / "out"
    rules = ("--rules", "splitlora,fedlora", "--seeds", "1", "--out", out)
    done = polyrank("compare", recipe, *QUICK, "fleet.cuts={T1 = 1}", *rules, "--no-figures")
    assert done.code == 0, done.err
    found = json.loads((out / "compare.json").read_text())
    assert [one["same"] for one in found["agreement"]] == [True]
    split, whole = (records(out / one / "lr-0.01" / "seed-0") for one in ("splitlora", "fedlora"))
    for one, other in zip(split, whole, strict=True):
        assert one["ranks"] == other["ranks"] == {"T1": 2}
        assert one["wire_up"] > 0
        assert other["wire_up"] == 0
    base = found["base"]["per_seed"][0]["seen"]["loss"]
    assert all(one["mean"]["seen"]["loss"] < base for one in found["methods"])


def test_splitlora_without_a_cut_of_its_type_is_refused_before_anything_is_begun(recipe, tmp_path):
    out = tmp_path / "run"
    done = polyrank("run", recipe, "baseline=splitlora", "--out", out)
    assert (done.code, "[fleet.cuts]" in done.err) == (1, True)
    done = polyrank("run", recipe, "baseline=splitlora", "fleet.cuts={T2 = 1}", "--out", out)
    assert (done.code, "clients of type T1 have no cut" in " ".join(done.err.split())) == (1, True)
    assert not out.exists()
