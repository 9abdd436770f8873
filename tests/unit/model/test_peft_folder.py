"""Adapters as PEFT folders, with peft itself as the oracle."""

import json
import math
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from models import batch, random_adapter, tiny, tiny_loaded, tiny_tokenizer
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import AdapterError, FolderExistsError
from polyrank.model.load import wrap_model
from polyrank.model.peft_folder import load_adapter, save_adapter
from polyrank.planning.scaling import Scaling

ARCHITECTURES = ["llama", "gpt2", "phi3", "qwen3", "gpt_neox", "opt"]
SCALINGS = [Scaling(), Scaling("proportional", 0.5), Scaling("fixed", 3), Scaling("rslora", 3)]

# Two ways to add one update in float64 differ by rounding alone, about 1e-15 per product.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def logits(module):
    with torch.no_grad():
        return module(batch()).logits


def added(module, adapter):
    """Return the module with ΔW added to its weights: the definition, without any of our code."""
    with torch.no_grad():
        for site, delta in adapter.items():
            layer = module.get_submodule(site)
            dense = delta.b @ delta.a
            layer.weight += dense.T if isinstance(layer, Conv1D) else dense
    return module


def unequal(model):
    """Return ranks 0, 1, 2, 3, 0, 1, … over the sites."""
    return {site: i % 4 for i, site in enumerate(model.spec.shapes)}


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ranks", [2, "unequal"])
def test_peft_computes_with_a_saved_folder_what_the_added_weights_compute(
    architecture, scaling, ranks, tmp_path
):
    model = tiny_loaded(architecture, dtype=torch.float64)
    adapter = random_adapter(model, unequal(model) if ranks == "unequal" else ranks)
    save_adapter(tmp_path / "a", adapter, model, scaling=scaling)
    base = tiny(architecture, dtype=torch.float64)
    expected = logits(added(tiny(architecture, dtype=torch.float64), adapter))
    assert (expected - logits(base)).abs().max() > 1e-3  # the adapter does something
    # Files hold float64 here; autocast would round the factors to float32.
    wrapped = PeftModel.from_pretrained(base, tmp_path / "a")
    torch.testing.assert_close(logits(wrapped), expected, **EXACT)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_reading_back_gives_the_same_updates(architecture, scaling, tmp_path):
    model = tiny_loaded(architecture, dtype=torch.float64)
    adapter = random_adapter(model, unequal(model))
    save_adapter(tmp_path / "a", adapter, model, scaling=scaling)
    back = load_adapter(tmp_path / "a", model)
    assert back.ranks == {site: r for site, r in adapter.ranks.items() if r}
    for site, delta in back.items():
        torch.testing.assert_close(delta.dense(), adapter[site].dense(), rtol=1e-14, atol=1e-15)


def test_the_proportional_default_comes_back_bit_by_bit(tmp_path):
    model = tiny_loaded("llama")
    adapter = random_adapter(model, 3)
    save_adapter(tmp_path / "a", adapter, model)
    assert load_adapter(tmp_path / "a", model).hash() == adapter.hash()


PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks by last name": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    "ranks by regular expression": {
        "rank_pattern": {r"layers\.1\..*\.(q|v)_proj": 1, "^model.layers.0.mlp.up_proj": 4},
        "alpha_pattern": {r".*\.mlp\..*": 3},
    },
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"v_proj": 1},
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "some left out": {"exclude_modules": ["v_proj"]},
    "a regular expression": {"target_modules": r".*\.0\.self_attn\.[qk]_proj"},
}


@pytest.mark.filterwarnings("ignore:.*rslora.*", "ignore:.*rank_pattern.*")
@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
def test_folders_that_peft_wrote_are_read_as_peft_reads_them(changes, tmp_path):
    options = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **changes}
    wrapped = get_peft_model(tiny("llama", dtype=torch.float64), LoraConfig(**options))
    check_reading(wrapped, "llama", tmp_path)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("fan", [True, False])
def test_a_conv1d_folder_is_read_whatever_fan_in_fan_out_says(fan, tmp_path):
    config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=fan)
    wrapped = get_peft_model(tiny("gpt2", dtype=torch.float64), config)
    check_reading(wrapped, "gpt2", tmp_path)


def check_reading(wrapped, architecture, tmp_path):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).double() / 4
    wrapped.save_pretrained(tmp_path / "a")
    model = tiny_loaded(architecture, dtype=torch.float64)
    adapter = load_adapter(tmp_path / "a", model)
    expected = logits(wrapped.eval())
    assert (expected - logits(model.module)).abs().max() > 1e-3
    torch.testing.assert_close(logits(added(model.module, adapter)), expected, **EXACT)


def test_the_scale_is_neither_dropped_nor_applied_twice(tmp_path):
    # By hand: s = α/r = 6/2 = 3, so the B in the file is a third of the one given.
    model = tiny_loaded("llama", sites=["q_proj"])
    adapter = random_adapter(model, 2)
    save_adapter(tmp_path / "a", adapter, model, scaling=Scaling("fixed", 6))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    site = "model.layers.0.self_attn.q_proj"
    stored = tensors[f"base_model.model.{site}.lora_B.weight"]
    torch.testing.assert_close(3 * stored, adapter[site].b)
    torch.testing.assert_close(load_adapter(tmp_path / "a", model)[site].b, adapter[site].b)


def test_unequal_ranks_are_patterns_and_rank_zero_is_left_out(tmp_path):
    model = tiny_loaded("gpt2")
    ranks = dict.fromkeys(model.spec.shapes, 2)
    ranks |= {"transformer.h.1.mlp.c_fc": 5, "transformer.h.0.attn.c_proj": 0}
    save_adapter(tmp_path / "a", random_adapter(model, ranks), model)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {"transformer.h.1.mlp.c_fc": 5}
    assert config["alpha_pattern"] == {"transformer.h.1.mlp.c_fc": 10}
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == [
        "c_attn",
        "c_fc",
        *(f"transformer.h.{place}" for place in ("0.mlp.c_proj", "1.attn.c_proj", "1.mlp.c_proj")),
    ]


def test_a_uniform_adapter_of_all_sites_has_a_plain_configuration(tmp_path):
    model = tiny_loaded("llama")
    save_adapter(tmp_path / "a", random_adapter(model, 4), model, base_name="org/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["target_modules"] == sorted(
        f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert "org/base" in (tmp_path / "a" / "README.md").read_text()


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    model = tiny_loaded("llama")
    for name in ("a", "b"):
        save_adapter(tmp_path / name, random_adapter(model, unequal(model)), model)
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_views_of_larger_factors_are_saved_as_what_they_show(tmp_path):
    model = tiny_loaded("llama")
    prefix = Adapter({site: d.prefix(1) for site, d in random_adapter(model, 3).items()})
    save_adapter(tmp_path / "a", prefix, model)
    assert load_adapter(tmp_path / "a", model).hash() == prefix.hash()


def test_factors_on_a_bfloat16_base_are_float32(tmp_path):
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    adapter = random_adapter(model, 2, dtype=torch.float32)
    save_adapter(tmp_path / "a", adapter, model)
    back = load_adapter(tmp_path / "a", model)
    assert back.hash() == adapter.hash()


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path):
    model = tiny_loaded("llama")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(FolderExistsError, match="never overwritten"):
        save_adapter(tmp_path / "a", random_adapter(model), model)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine.txt"]


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = tiny_loaded("llama")
    monkeypatch.setattr("polyrank.model.peft_folder.save_file", full)
    with pytest.raises(AdapterError, match="No space left"):
        save_adapter(tmp_path / "a", random_adapter(model), model)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    model = tiny_loaded("llama")
    before = os.umask(0o022)
    try:
        save_adapter(tmp_path / "out", random_adapter(model), model)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o644}


def test_an_empty_folder_may_be_used_and_parents_are_made(tmp_path):
    model = tiny_loaded("llama")
    (tmp_path / "a").mkdir()
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        save_adapter(folder, random_adapter(model), model)
        assert len(load_adapter(folder, model)) == 14


def test_adapters_that_cannot_be_written_are_refused(tmp_path):
    model = tiny_loaded("llama", sites=["q_proj"])
    site, other = model.spec.shapes
    good = random_adapter(model)
    with pytest.raises(AdapterError, match="nothing to write"):
        save_adapter(tmp_path / "a", random_adapter(model, 0), model)
    with pytest.raises(AdapterError, match=r"h\.0\.attn is not a site"):
        save_adapter(tmp_path / "a", Adapter({"h.0.attn": good[site]}), model)
    wrong = LowRank(torch.zeros(16, 2), torch.zeros(2, 17))
    with pytest.raises(AdapterError, match=r"expected an update of \(16, 16\).*got \(16, 17\)"):
        save_adapter(tmp_path / "a", Adapter({site: wrong}), model)
    bad = LowRank(good[other].b * math.nan, good[other].a)
    with pytest.raises(AdapterError, match=f"{other} hold NaN"):
        save_adapter(tmp_path / "a", Adapter({other: bad}), model)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def saved(tmp_path):
    model = tiny_loaded("llama")
    save_adapter(tmp_path / "a", random_adapter(model, 2), model)
    return tmp_path / "a", model


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"something_of_the_future": 3}, "something_of_the_future"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"r": 4}, "expected factors of rank 4"),
        ({"rank_pattern": {"q_proj": 3}}, "expected factors of rank 3"),
        ({"rank_pattern": {"(q_proj": 3}}, "makes no sense"),
        ({"r": 0}, "makes no sense|peft accepts"),
        ({"target_modules": ["q_proj"]}, "not among the target modules"),
        ({"target_modules": ["c_attn"]}, "not among the target modules"),
    ],
)
def test_what_a_low_rank_update_cannot_express_is_refused_by_name(saved, changes, named):
    folder, model = saved
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=named):
        load_adapter(folder, model)


def test_missing_and_unknown_tensors_are_named(saved):
    folder, model = saved
    site = "base_model.model.model.layers.1.mlp.up_proj"
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    edit_tensors(folder, lambda t: t.pop(f"{site}.lora_A.weight"))
    with pytest.raises(AdapterError, match=r"only one of the two factors at model\.layers\.1\.mlp"):
        load_adapter(folder, model)
    edit_tensors(folder, lambda t: t.pop(f"{site}.lora_B.weight"))
    with pytest.raises(AdapterError, match=r"targets \['model\.layers\.1\.mlp\.up_proj'\]"):
        load_adapter(folder, model)
    for extra in ("model.embed_tokens.lora_embedding_A", "model.layers.0.mlp.up_proj.bias"):
        path.write_bytes(whole)
        edit_tensors(
            folder, lambda t, name=extra: t.update({f"base_model.model.{name}": torch.zeros(2, 2)})
        )
        with pytest.raises(AdapterError, match=extra):
            load_adapter(folder, model)


def test_adapters_of_the_head_are_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    get_peft_model(tiny("llama"), config).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    with pytest.raises(AdapterError, match="lm_head is not a site"):
        load_adapter(tmp_path / "a", tiny_loaded("llama"))


def test_an_adapter_of_more_than_the_models_sites_is_not_cut_silently(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match="Load the model with sites that include it"):
        load_adapter(folder, tiny_loaded("llama", sites=["q_proj"]))


def test_an_adapter_of_another_model_is_refused(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match="another model"):
        load_adapter(folder, tiny_loaded("gpt2"))
    wide = wrap_model(tiny("llama", intermediate_size=32), tiny_tokenizer())
    with pytest.raises(AdapterError, match="another size"):
        load_adapter(folder, wide)


def test_factors_that_are_not_finite_are_refused(saved):
    folder, model = saved
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    edit_tensors(folder, lambda t: t[key].fill_(math.inf))
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.up_proj hold NaN or infinity"):
        load_adapter(folder, model)


def test_unreadable_folders_are_refused(saved, tmp_path):
    folder, model = saved
    with pytest.raises(AdapterError, match="cannot be read as a PEFT configuration"):
        load_adapter(tmp_path / "none", model)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(folder, model)
    weights.unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(folder, model)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="never reads"):
        load_adapter(folder, model)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="expected peft_type LORA"):
        load_adapter(folder, model)
