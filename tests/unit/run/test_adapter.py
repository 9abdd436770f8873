"""The adapter that a run ends with: exact sums become factors where they must, and nowhere else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dense_oracle import random_merged, random_sparse
from federations import MEASURED, opened
from models import batch, random_adapter, tiny_loaded
from polyrank.aggregation import FLoRA
from polyrank.algebra import Adapter, Dense, LowRank
from polyrank.errors import AdapterError, RankError
from polyrank.model import applied, load_adapter
from polyrank.planning import Scaling
from polyrank.run import GlobalAdapter, RunSettings
from polyrank.run.spectra import Spectrum, read_spectra, write_spectra


def mixture(model) -> Adapter:
    """Return factors at the first site, values at the second, dense sums at all others."""
    first, second, *_ = model.spec.shapes
    return Adapter(
        {
            **random_merged(model),
            first: random_adapter(model, 3)[first],
            second: random_sparse(model, 20)[second],
        }
    )


def optimum(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Return the best approximation and the energy that it lacks, by torch's own SVD."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float(s[rank:].square().sum())


def test_whatever_is_not_factors_is_cut_to_the_servers_rank_and_the_share_lost_is_told():
    model = tiny_loaded("llama", dtype=torch.float64)
    kept = mixture(model)
    ranks = {site: 2 + i % 3 for i, site in enumerate(kept)}
    found, lost = GlobalAdapter(kept, model, Scaling(), ranks).lowrank()
    first = next(iter(model.spec.shapes))
    assert found[first] is kept[first], "stored factors stay as they are, also above that rank"
    missing, energy = 0.0, sum(d.norm() ** 2 for d in kept.values())
    for site, delta in kept.items():
        assert isinstance(found[site], LowRank)
        if site != first:
            best, lack = optimum(delta.dense(), ranks[site])
            torch.testing.assert_close(found[site].dense(), best, rtol=0, atol=1e-10)
            missing += lack
    assert lost == pytest.approx(missing / energy, rel=1e-9)
    assert lost > 0.01


def test_truncation_takes_every_kind():
    model = tiny_loaded("llama", dtype=torch.float64)
    kept = mixture(model)
    found, lost = GlobalAdapter(kept, model, Scaling()).truncated(2)
    missing = 0.0
    for site, delta in kept.items():
        best, lack = optimum(delta.dense(), 2)
        torch.testing.assert_close(found[site].dense(), best, rtol=0, atol=1e-10)
        missing += lack
    assert lost == pytest.approx(missing / kept.norm() ** 2, rel=1e-9)
    with pytest.raises(RankError, match="at least 1"):
        GlobalAdapter(kept, model, Scaling()).truncated(0)


def test_a_saved_folder_of_sums_at_full_rank_computes_what_the_sums_compute(tmp_path):
    model = tiny_loaded("gpt2", dtype=torch.float64)
    kept = mixture(model)
    assert GlobalAdapter(kept, model, Scaling()).save(tmp_path / "a") < 1e-12
    with applied(model, kept):
        expected = model.module(batch()).logits
    with applied(model, load_adapter(tmp_path / "a", model)):
        torch.testing.assert_close(model.module(batch()).logits, expected, rtol=0, atol=1e-9)


def test_a_merged_folder_has_the_whole_sums(tmp_path):
    model = tiny_loaded("gpt2", dtype=torch.float64)
    kept = mixture(model)
    GlobalAdapter(kept, model, Scaling(), dict.fromkeys(kept, 1)).save_merged(tmp_path / "m")
    with applied(model, kept):
        expected = model.module(batch()).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    torch.testing.assert_close(merged(batch()).logits, expected, rtol=0, atol=1e-10)


def test_a_sum_with_a_nan_is_refused_before_it_is_factored():
    model = tiny_loaded("llama")
    site, (m, n) = next(iter(model.spec.shapes.items()))
    broken = Adapter({site: Dense(torch.full((m, n), float("nan")))})
    with pytest.raises(AdapterError, match="NaN"):
        GlobalAdapter(broken, model, Scaling()).truncated(2)


def test_a_run_whose_rule_merges_tells_what_its_adapter_folder_lacks(tmp_path):
    run_settings = RunSettings(evaluation=MEASURED, cohort=2)
    with opened(tmp_path / "run", rule=FLoRA(), settings=run_settings) as run:
        list(run.rounds(3))
        summary = run.finish()
        found, lost = run.adapter.lowrank()
    ranks = {site: d.rank for site, d in found.items()}
    assert all(isinstance(delta, Dense) for delta in run.adapter.factors.values())
    assert set(ranks.values()) == {5}, "the largest of the fleet"
    assert summary["adapter_lost"] == lost > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["adapter_lost"] == lost
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(5 in tensor.shape for tensor in tensors.values())


def test_spectra_of_sums_are_those_of_the_matrices(tmp_path):
    model = tiny_loaded("llama")
    sums = random_merged(model)
    for delta in sums.values():
        found, exact = Spectrum.of(delta), torch.linalg.svdvals(delta.dense().double())
        assert found.norm == pytest.approx(float(exact.norm()), rel=1e-4)
        assert found.first == pytest.approx(float(exact[0]), rel=1e-4)
    write_spectra(tmp_path, 3, sums)  # Too many singular values to compute for nobody.
    assert read_spectra(tmp_path, 3) is None


def test_stored_spectra_are_read_for_their_own_round_alone(tmp_path):
    model = tiny_loaded("llama")
    adapter = random_adapter(model, 2)
    write_spectra(tmp_path, 3, adapter)
    assert read_spectra(tmp_path, 3) == {s: Spectrum.of(delta) for s, delta in adapter.items()}
    assert read_spectra(tmp_path, 4) is None
