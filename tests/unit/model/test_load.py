import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config

from kit import kit_path
from models import CONFIGS, EOS, PAD, batch, tiny, tiny_loaded, tiny_tokenizer, write_tiny
from polyrank.errors import ModelError, SiteError
from polyrank.model.describe import UNBOUNDED, describe
from polyrank.model.load import load_model, resolve_device, wrap_model


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_frozen_in_evaluation_mode_and_described(folder):
    model = load_model(folder, device="cpu", sites=["q_proj", "mlp.up_proj"])
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model.source == str(folder)
    spec = model.spec
    assert spec.architecture == "LlamaForCausalLM"
    assert (spec.blocks, spec.hidden, spec.vocabulary, spec.context) == (2, 16, 97, 64)
    # Embedding and head 97·16 each, per block q, o 16·16, k, v 8·16, three of 24·16 and two norms.
    assert spec.parameters == 2 * 97 * 16 + 2 * (2 * 256 + 2 * 128 + 3 * 384 + 2 * 16) + 16
    assert [site.name for site in spec.sites] == [
        f"model.layers.{block}.{name}"
        for block in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id) == (PAD, EOS)
    with torch.no_grad():
        expected = tiny("llama")(batch()).logits
        assert torch.equal(model.module(batch()).logits, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_base_comes_in_the_dtype_asked_for(folder, dtype):
    model = load_model(str(folder), device="cpu", dtype=dtype)
    assert {p.dtype for p in model.module.parameters()} == {model.dtype} == {getattr(torch, dtype)}


@pytest.mark.kit
@pytest.mark.parametrize("name", ["stories260K-hf", "base3m-hf"])
def test_small_pretrained_models_load(name):
    model = load_model(kit_path("models", name), device="cpu")
    assert len(model.spec.sites) == 7 * model.spec.blocks


def test_auto_takes_a_device_that_works():
    device = resolve_device("auto")
    assert torch.ones(2, device=device).sum() == 2


def test_devices_that_are_not_here_are_refused():
    with pytest.raises(ModelError, match="expected auto, cpu, cuda or mps, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ModelError, match="not usable here"):
        resolve_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"'cuda:0' is not usable here; there is \[.*'cpu'\]"):
            resolve_device("cuda:0")


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ModelError, match=r"float32.*got 'float16'"):
        load_model(folder, dtype="float16")


def test_a_missing_folder_is_named(tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(ModelError, match=r"expected a folder with a model in it.*none"):
            load_model(source)


def test_a_hub_id_without_network_names_the_id_and_the_remedy(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"some-org/some-model.*check the id and the network.*folder"
    ):
        load_model("some-org/some-model")


def test_an_unreadable_configuration_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="its configuration cannot be read"):
        load_model(folder)


def test_code_that_comes_with_a_model_is_not_run(folder):
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    edit(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    )
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(folder)


def test_models_that_are_not_causal_are_refused(tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(num_attention_heads=2, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"expected a causal language model.*BertForMaskedLM"):
        load_model(tmp_path / "bert")
    T5Config(vocab_size=97).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_model(tmp_path / "t5")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        load_model(folder)


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_model(folder)


def test_missing_tensors_are_not_filled_at_random(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj.*random"):
        load_model(folder)


def test_a_given_module_is_frozen_and_leaves_training_mode():
    module = tiny("gpt2").train()
    model = wrap_model(module, tiny_tokenizer())
    assert not any(part.training for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence():
    model = wrap_model(tiny(), tiny_tokenizer(pad_token=None))
    assert model.tokenizer.pad_token_id == EOS


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    tiny_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"end-of-sequence token.*tokenizer_config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, architecture):
    # transformers gives one with special tokens alone, to which every text is empty.
    tiny(architecture).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(tmp_path)


def test_an_end_of_sequence_beyond_the_vocabulary_is_refused():
    small = tiny(vocab_size=2, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    with pytest.raises(ModelError, match=r"vocabulary of 2, got 2"):
        wrap_model(small, tiny_tokenizer())


def test_errors_of_sites_come_from_loading_as_well(folder):
    with pytest.raises(SiteError, match="matches no"):
        load_model(folder, sites=["c_attn"])


def test_a_model_can_be_described_without_weights():
    kind, sizes = CONFIGS["bloom"]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(kind(**sizes))
    spec = describe(module, sites=["query_key_value"])
    assert next(module.parameters()).is_meta
    assert (spec.parameters, spec.context) == (describe(tiny("bloom")).parameters, UNBOUNDED)
    assert list(spec.shapes.values()) == [(48, 16), (48, 16)]


# gpt2 and opt have dropouts of 0.1 of their own, which training mode would switch on.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "gemma2"])
def test_checkpointing_changes_neither_loss_nor_gradients(architecture):
    def loss_and_gradients(checkpointing):
        model = tiny_loaded(architecture, dtype=torch.float64, checkpointing=checkpointing)
        site = model.module.get_submodule(model.spec.sites[0].name)
        site.weight.requires_grad_(True)
        calls = []
        site.register_forward_hook(lambda *_: calls.append(1))
        loss = model.module(batch(), labels=batch(), use_cache=False).loss
        loss.backward()
        return loss, site.weight.grad, len(calls)

    loss, gradient, calls = loss_and_gradients(False)
    again, gradient_again, calls_again = loss_and_gradients(True)
    assert (calls, calls_again) == (1, 2)  # the block was computed again
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)
    assert gradient.abs().max() > 0


def test_checkpointing_leaves_the_blocks_inputs_only():
    def saved(checkpointing):
        model = tiny_loaded("llama", checkpointing=checkpointing)
        model.module.get_input_embeddings().weight.requires_grad_(True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: _):
            model.module.model(batch(), use_cache=False)
        return kept

    inside = torch.Size([*batch().shape, 24])  # an activation of the feed-forward part
    assert inside in saved(False)
    assert inside not in saved(True)
