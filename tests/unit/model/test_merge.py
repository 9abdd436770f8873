import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import batch, random_adapter, tiny, tiny_loaded
from polyrank.algebra import Adapter
from polyrank.errors import AdapterError, FolderExistsError, SiteError
from polyrank.model.load import load_model
from polyrank.model.merge import save_merged
from polyrank.model.peft_folder import save_adapter


def logits(module):
    with torch.no_grad():
        return module(batch()).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen3", "gemma2", "qwen2_moe"])
def test_a_merged_folder_computes_what_base_and_adapter_compute(architecture, tmp_path):
    model = tiny_loaded(architecture)
    adapter = random_adapter(model, {site: i % 3 for i, site in enumerate(model.spec.shapes)})
    lost = save_merged(tmp_path / "merged", adapter, model)
    save_adapter(tmp_path / "adapter", adapter, model)
    expected = logits(PeftModel.from_pretrained(tiny(architecture), tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (expected - logits(model.module)).abs().max() > 1e-2
    # Rounding each sum to float32 (1e-7 relative) through two blocks.
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert 0 < lost < 1e-6


def test_merging_in_float64_is_exact_enough(tmp_path):
    model = tiny_loaded("gpt2", dtype=torch.float64)
    adapter = random_adapter(model, 2)
    assert save_merged(tmp_path / "m", adapter, model) < 1e-15
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    site = "transformer.h.1.mlp.c_fc"
    expected = model.module.get_submodule(site).weight + adapter[site].dense().T
    torch.testing.assert_close(merged.get_submodule(site).weight.data, expected, rtol=0, atol=1e-15)


def test_the_loaded_base_and_its_configuration_stay_as_they_were(tmp_path):
    model = tiny_loaded("llama")
    before = {name: p.clone() for name, p in model.module.state_dict().items()}
    config = model.module.config.to_dict()
    save_merged(tmp_path / "m", random_adapter(model), model)
    assert all(torch.equal(p, before[name]) for name, p in model.module.state_dict().items())
    assert model.module.config.to_dict() == config


def test_the_folder_is_a_whole_model_with_its_tokenizer(tmp_path):
    model = tiny_loaded("llama")
    save_merged(tmp_path / "m", random_adapter(model), model)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").decode([5, 6]) == "w5 w6"
    assert load_model(tmp_path / "m").spec == model.spec
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_loaded("llama", tie_word_embeddings=True)
    save_merged(tmp_path / "m", random_adapter(model), model)
    merged = load_model(tmp_path / "m").module
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_bfloat16_reports_how_much_of_the_update_rounding_took(tmp_path):
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    adapter = random_adapter(model, 2, dtype=torch.float32)
    ordinary = save_merged(tmp_path / "a", adapter, model)
    tiny_update = save_merged(tmp_path / "b", adapter.scale(1e-5), model)
    merged = load_model(tmp_path / "a", dtype="bfloat16").module
    error = exact = 0.0
    for site, delta in adapter.items():
        target = model.module.get_submodule(site).weight.double() + delta.dense().double()
        error += float((merged.get_submodule(site).weight.double() - target).norm() ** 2)
        exact += float(delta.dense().double().norm() ** 2)
    assert ordinary == pytest.approx(math.sqrt(error / exact), rel=1e-3)
    assert ordinary < 0.01
    assert tiny_update > 0.5


def test_an_empty_adapter_merges_into_the_base(tmp_path):
    model = tiny_loaded("llama")
    assert save_merged(tmp_path / "m", Adapter({}), model) == 0.0
    assert torch.equal(logits(load_model(tmp_path / "m").module), logits(model.module))


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path):
    model = tiny_loaded("llama")
    good = random_adapter(model)
    site = next(iter(good))
    with pytest.raises(SiteError, match="no such site"):
        save_merged(tmp_path / "m", random_adapter(tiny_loaded("gpt2")), model)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        save_merged(tmp_path / "m", Adapter({site: good[site].scale(math.inf)}), model)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").touch()
    with pytest.raises(FolderExistsError):
        save_merged(tmp_path / "m", good, model)
