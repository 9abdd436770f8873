"""What is read off a model without weights, and what cannot be."""

import json

import pytest
from transformers import LlamaConfig, T5Config

from models import CONFIGS, tiny, tiny_loaded, write_tiny
from polyrank.errors import ModelError
from polyrank.model.anatomy import anatomy_of, meta_model
from polyrank.model.describe import describe


def test_a_config_alone_is_enough(tmp_path):
    whole = write_tiny(tmp_path / "whole", "qwen3")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((whole / "config.json").read_text())
    model = tiny_loaded("qwen3")
    anatomy = anatomy_of(alone)
    assert anatomy == anatomy_of(whole) == anatomy_of(model) == anatomy_of(model.module)
    assert describe(meta_model(alone)).sites == model.spec.sites


def test_a_model_of_70_billion_parameters_takes_no_memory():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    anatomy = anatomy_of(config, "bfloat16")
    assert anatomy.parameters(set(range(80))) == 70_553_706_496
    assert (len(anatomy.kinds), anatomy.itemsize) == (1, 2)
    assert all(parameter.is_meta for parameter in meta_model(config).parameters())


@pytest.mark.parametrize("architecture", [*sorted(set(CONFIGS) - {"mixtral", "qwen2_moe"})])
def test_blocks_are_told_apart_by_their_kind(architecture):
    module = tiny(architecture)
    anatomy = anatomy_of(module)
    sliding = architecture in ("gemma2", "gemma3")
    assert [block.kind for block in anatomy.blocks] == ([0, 1] if sliding else [0, 0])
    assert anatomy.parameters({0, 1}) == sum(p.numel() for p in module.parameters())
    assert anatomy.vocabulary == 97
    assert anatomy.hidden == module.config.hidden_size
    assert anatomy_of(module, "bfloat16").itemsize == 2


def test_the_attention_kernel_is_named():
    assert anatomy_of(tiny("llama")).attention == "fused"
    assert anatomy_of(tiny("gemma2")).attention == "eager", "its scores are capped"
    assert anatomy_of(tiny("llama", attn_implementation="eager")).attention == "eager"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"config.*cannot be read|cannot be read.*config"),
        ("{not json", "cannot be read"),
        ({"model_type": "no-such-model"}, "cannot be read"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "causal"),
        ({"model_type": "t5"}, "no causal language model can be made"),
        ({"model_type": "llama", "num_attention_heads": 0}, r"model .*: "),
    ],
)
def test_configs_that_cannot_be_read_are_refused(tmp_path, written, message):
    folder = tmp_path / "model"
    folder.mkdir()
    if written is not None:
        text = written if isinstance(written, str) else json.dumps(written)
        (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        anatomy_of(folder)


def test_folders_kinds_and_number_formats_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ModelError, match="expected a folder"):
        anatomy_of(tmp_path / "absent")
    with pytest.raises(ModelError, match="no causal language model"):
        anatomy_of(T5Config())
    with pytest.raises(ModelError, match=r"model\.dtype: expected one of .*got 'int3'"):
        anatomy_of(tiny("llama").config, "int3")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_mixtures_of_experts_are_refused_as_their_costs_depend_on_the_tokens(architecture):
    with pytest.raises(
        ModelError, match=r"mixture of experts.*cannot be foreseen\. Give every client"
    ):
        anatomy_of(tiny(architecture))
