"""Runs whose result is an exact sum: saved, exported and inspected like any other."""

import json

import torch
from safetensors.torch import load_file

from federations import QUIET, federation
from polyrank.aggregation import FlexLoRA, SLoRA
from polyrank.algebra import LowRank, Sparse
from polyrank.federation import Conduct
from polyrank.inside import look
from runs import polyrank, write_recipe

FAST = ("rounds=2", "evaluation.generate=0", "evaluation.every=0", "local.steps=1")


def ranks(folder):
    factors = load_file(folder / "adapter_model.safetensors")
    return {tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name}


def products(folder):
    """Return s·BA by matrix."""
    factors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, a in factors.items():
        if "lora_A" in name:
            site = name.split(".lora_A")[0].removeprefix("base_model.model.")
            alpha = config["alpha_pattern"].get(site, config["lora_alpha"])
            b = factors[name.replace("lora_A", "lora_B")]
            found[site] = alpha / a.shape[0] * b.double() @ a.double()
    return found


def test_an_export_without_a_rank_is_what_the_run_saved(tmp_path):
    """At the server's rank, not at the full rank of the sum."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    done = polyrank("run", recipe, *FAST, "aggregation.rule=flora", "--out", run)
    assert done.code == 0, done.err
    assert polyrank("export", run, tmp_path / "again").code == 0
    assert ranks(tmp_path / "again") == ranks(run / "adapter") == {2, 6}
    saved, again = products(run / "adapter"), products(tmp_path / "again")
    assert saved.keys() == again.keys()
    assert all(torch.allclose(saved[site], again[site], atol=1e-6) for site in saved)


def test_a_server_rank_of_the_recipe_is_that_of_the_export(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    asked = ("aggregation.rule=flora", "aggregation.server_rank=3")
    assert polyrank("run", recipe, *FAST, *asked, "--out", run).code == 0
    assert polyrank("export", run, tmp_path / "again").code == 0
    assert ranks(tmp_path / "again") == ranks(run / "adapter") == {3}


def test_what_the_cut_of_a_sum_loses_is_told(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    done = polyrank("run", recipe, *FAST, "aggregation.rule=flora", "--out", run)
    assert "lacks" in done.out
    told = json.loads((run / "summary.json").read_text())["adapter_lost"]
    export = polyrank("export", run, tmp_path / "small", "--rank", "2")
    share = float(export.out.split("keeps ")[1].split("%")[0])
    assert 0 <= told < 1 - share / 100 < 1


def test_a_run_of_a_sparse_stage_can_be_inspected_and_exported_in_it(tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    asked = ("local.method=slora", "local.sparse_rounds=2", "rounds=3")
    assert polyrank("run", recipe, *FAST, *asked, "--out", run).code == 0
    for checkpoint in (run / "checkpoints").glob("round-00003*"):
        checkpoint.rename(run / "checkpoints" / "away")
    assert polyrank("inspect", run).code == 0
    done = polyrank("export", run, tmp_path / "out")
    assert done.code == 0, done.err
    assert ranks(tmp_path / "out") == {2, 6}


def test_a_sparse_run_made_from_python_can_be_inspected_in_it_and_after_it(tmp_path):
    for rounds in (1, 3):
        out = tmp_path / str(rounds)
        conduct = Conduct(evaluation=QUIET, cohort=2)
        with federation(out, rule=SLoRA(FlexLoRA("delta"), 2), conduct=conduct) as run:
            list(run.rounds(rounds))
        found = look(out).factors
        assert {type(delta) for delta in found.values()} == {Sparse if rounds == 1 else LowRank}
        done = polyrank("inspect", out)
        assert done.code == 0, done.err
