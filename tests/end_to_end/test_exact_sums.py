"""Runs whose result is an exact sum: saved, exported and inspected like any other."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from federations import QUIET, opened
from polyrank.aggregation import FlexLoRA, SLoRA
from polyrank.algebra import Dense, LowRank, Sparse
from polyrank.run import RunFolder, RunSettings
from polyrank.runner.inspect import adapter_of, look
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


@pytest.fixture(scope="module", params=["flora", "flora:keep"])
def finished(request, tmp_path_factory):
    """A run whose result is an exact sum, and the folder of its base."""
    at = tmp_path_factory.mktemp("run")
    recipe, run = write_recipe(at), at / "run"
    asked = (f"aggregation.rule={request.param}", "sampling.fraction=1")
    done = polyrank("run", recipe, *FAST, *asked, "--out", run)
    assert done.code == 0, done.err
    return run, at / "base"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def added(base, updates):
    """Return a float32 base of its own with these matrices added."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for site, update in updates.items():
            model.get_submodule(site).weight += update.float()
    return model


def test_an_export_at_a_rank_is_the_best_of_that_rank_in_peft_and_tells_what_it_keeps(
    finished, tmp_path
):
    run, base = finished
    sums = adapter_of(run).factors
    kept = energy = 0.0
    best = {}
    for site, delta in sums.items():
        u, s, vh = torch.linalg.svd(delta.dense().double(), full_matrices=False)
        best[site] = (u[:, :3] * s[:3]) @ vh[:3]
        kept, energy = kept + float(s[:3].square().sum()), energy + float(s.square().sum())
    done = polyrank("export", run, tmp_path / "three", "--rank", "3")
    assert done.code == 0, done.err
    share = float(done.out.split("rank 3 keeps ")[1].split("%")[0])
    assert share == pytest.approx(100 * kept / energy, abs=6e-4)  # printed to three places
    assert share < 99.99
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = logits(added(base, best))
    assert (expected - logits(plain)).abs().max() > 1e-2
    got = logits(PeftModel.from_pretrained(plain, tmp_path / "three"))
    # float32 through two blocks.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_export_computes_base_and_sum_and_loses_no_more_than_rounding(finished, tmp_path):
    run, base = finished
    sums = adapter_of(run).factors
    assert all(isinstance(delta, Dense) for delta in sums.values())
    done = polyrank("export", run, tmp_path / "merged", "--merged")
    assert done.code == 0, done.err
    assert float(done.out.split("changed the update by ")[1].split()[0]) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    whole = added(base, {site: delta.dense() for site, delta in sums.items()})
    torch.testing.assert_close(logits(merged), logits(whole), rtol=1e-5, atol=1e-6)


def test_an_export_without_a_rank_tells_what_the_cut_took_and_is_silent_without_one(
    finished, tmp_path
):
    run, _ = finished
    told = json.loads((run / "summary.json").read_text())["adapter_lost"]
    out = polyrank("export", run, tmp_path / "again").out
    assert float(out.split("the server's rank keeps ")[1].split("%")[0]) == pytest.approx(
        100 * (1 - told), abs=6e-4
    )
    recipe = write_recipe(tmp_path)
    asked = ("aggregation.rule=flexlora", "--out", tmp_path / "run")
    assert polyrank("run", recipe, *FAST, *asked).code == 0
    assert "keeps" not in polyrank("export", tmp_path / "run", tmp_path / "factors").out


def test_the_key_of_a_recipe_and_the_other_name_come_to_the_same_rules(tmp_path):
    recipe = write_recipe(tmp_path)
    asked = {
        "named": ("flora:keep",),
        "key": ("flora", "aggregation.reinitialise=false"),
        "alias": ("noise-free",),
        "plain": ("flora", "aggregation.reinitialise=true"),
    }
    found = {}
    for name, (rule, *more) in asked.items():
        out = tmp_path / name
        more += ["sampling.fraction=1"]  # With others in round 2, all would begin anew.
        done = polyrank("run", recipe, *FAST, f"aggregation.rule={rule}", *more, "--out", out)
        assert done.code == 0, done.err
        found[name] = adapter_of(out).factors.hash()
        assert polyrank("resume", out).code == 0
    assert found["named"] == found["key"] != found["alias"] == found["plain"]


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
        run_settings = RunSettings(evaluation=QUIET, cohort=2)
        with opened(out, rule=SLoRA(FlexLoRA("delta"), 2), settings=run_settings) as run:
            list(run.rounds(rounds))
        saved = RunFolder.peek(out).load_checkpoint().state
        adapter = SLoRA(FlexLoRA("delta"), 2).adapter(saved)
        assert {type(delta) for delta in adapter.values()} == {Sparse if rounds == 1 else LowRank}
        norms = {site: spectrum.norm for site, spectrum in look(out).spectra().items()}
        assert norms == pytest.approx({site: delta.norm() for site, delta in adapter.items()})
        done = polyrank("inspect", out)
        assert done.code == 0, done.err
