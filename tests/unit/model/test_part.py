"""A part of a model is read from the files as the whole is, and nothing else of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import batch, tiny, tiny_loaded, tiny_tokenizer, write_tiny
from polyrank.errors import ModelError, SiteError
from polyrank.model import Cut, LoadedModel, Span, load_model, logits_at, wrap_model
from polyrank.model.stored import stored_tensors

BLOCKS = 4
LAYERS = {
    "gpt2": {"n_layer": BLOCKS},
    "bloom": {"n_layer": BLOCKS},
    "gemma3": {
        "num_hidden_layers": BLOCKS,
        "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2),
    },
    # Tokens are embedded in 8 numbers and projected to 16 before the blocks, and back behind them.
    "opt": {"num_hidden_layers": BLOCKS, "word_embed_proj_dim": 8},
}
HEAD, MIDDLE, TAIL = [Span(0, 1)], [Span(1, 3)], [Span(3)]


def write(folder, architecture="llama", **changes):
    sizes = LAYERS.get(architecture, {"num_hidden_layers": BLOCKS})
    return write_tiny(folder, architecture, **{**sizes, **changes})


def held(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer that is not on the meta device."""
    tensors = [
        *model.module.named_parameters(remove_duplicate=False),
        *model.module.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor for name, tensor in tensors if not tensor.is_meta}


def assert_composed(folder, dtype="float32"):
    """Three machines that hold a third each compute what the whole model does, bit for bit."""
    whole = load_model(folder, device="cpu", dtype=dtype)
    parts = [load_model(folder, device="cpu", dtype=dtype, spans=s) for s in (HEAD, MIDDLE, TAIL)]
    everything = held(whole)
    for part in parts:
        for name, tensor in held(part).items():
            assert tensor.dtype == everything[name].dtype
            assert torch.equal(tensor, everything[name]), name
    ids, positions = batch(2, 9), torch.tensor([0, 5, 16])
    head, middle, tail = (Cut(part, 1, 3) for part in parts)
    with torch.no_grad():
        got = tail.tail(middle.middle(head.head(ids)), positions)
        assert torch.equal(got, logits_at(whole, ids, positions))
    return parts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral"],
)
def test_parts_hold_what_the_whole_holds_and_compose_to_it(tmp_path, architecture, tied):
    folder = write(tmp_path / "base", architecture, tie_word_embeddings=tied)
    head, middle, tail = assert_composed(folder)
    assert [sorted(part.hosted) for part in (head, middle, tail)] == [[0], [1, 2], [3]]
    assert {site.block for site in middle.spec.sites} == {1, 2}
    embedded, out = (
        [get(part.module).weight.is_meta for part in (head, middle, tail)]
        for get in (
            lambda module: module.get_input_embeddings(),
            lambda module: module.get_output_embeddings(),
        )
    )
    assert embedded == [False, True, not tied]
    assert out == [not tied, True, False]


def test_nothing_is_held_but_the_blocks_and_what_goes_with_them(tmp_path):
    folder = write(tmp_path / "base")
    head = load_model(folder, device="cpu", spans=HEAD)
    assert {name.split(".layers.")[-1].split(".")[0] for name in held(head)} == {
        "0",
        "model",  # The embedding and the rotary frequencies.
    }
    assert "model.norm.weight" not in held(head)
    assert head.device.type == "cpu"
    tail = load_model(folder, device="cpu", spans=TAIL)
    assert {"model.norm.weight", "lm_head.weight"} < set(held(tail))
    assert "model.embed_tokens.weight" not in held(tail)
    assert tail.device.type == "cpu"


def test_the_client_of_a_u_shape_holds_both_ends(tmp_path):
    folder = write(tmp_path / "base")
    whole = load_model(folder, device="cpu")
    client = load_model(folder, device="cpu", spans=[Span(0, 1), Span(3)])
    server = load_model(folder, device="cpu", spans=MIDDLE)
    ids, positions = batch(2, 9), torch.tensor([0, 5, 16])
    ends, between = Cut(client, 1, 3), Cut(server, 1, 3)
    with torch.no_grad():
        got = ends.tail(between.middle(ends.head(ids)), positions)
        assert torch.equal(got, logits_at(whole, ids, positions))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_parts_come_in_the_dtype_asked_for(tmp_path, architecture, dtype):
    assert_composed(write(tmp_path / "base", architecture), dtype)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_files_of_the_bare_decoder_are_read_as_transformers_reads_them(tmp_path, architecture):
    folder = write(tmp_path / "base", architecture, tie_word_embeddings=True)
    prefix = {"llama": "model.", "gpt2": "transformer."}[architecture]
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert not set(renamed) & set(tensors)
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert_composed(folder)


def test_of_several_files_only_those_with_hosted_tensors_are_opened(tmp_path):
    folder = write(tmp_path / "base")
    module = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    module.save_pretrained(folder, max_shard_size="8KB")
    assert_composed(folder)
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        placed[name]
        for name in placed
        if name.startswith("model.layers.0.") or name == "model.embed_tokens.weight"
    }
    others = set(placed.values()) - needed
    assert needed
    assert others
    for shard in others:
        (folder / shard).unlink()
    whole = tiny_loaded(num_hidden_layers=BLOCKS)
    head = Cut(load_model(folder, device="cpu", spans=HEAD), 1)
    with torch.no_grad():
        assert torch.equal(head.head(batch()), Cut(whole, 1).head(batch()))
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_model(folder, device="cpu", spans=TAIL)


def test_missing_tensors_are_told_where_they_are_needed(tmp_path):
    folder = write(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, device="cpu", spans=HEAD)
    with pytest.raises(ModelError, match=r"lack 1 tensors .*model\.layers\.2\.mlp\.up_proj"):
        load_model(folder, device="cpu", spans=MIDDLE)


def test_tensors_of_another_shape_are_told(tmp_path):
    folder = write(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(5, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, device="cpu", spans=HEAD)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_model(folder, device="cpu", spans=TAIL)


def test_a_folder_without_weights_is_told(tmp_path):
    folder = write(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_model(folder, device="cpu", spans=HEAD)


def test_blocks_that_are_not_held_are_not_run(tmp_path):
    folder = write(tmp_path / "base")
    head = load_model(folder, device="cpu", spans=HEAD)
    cut = Cut(head, 1)
    with pytest.raises(ModelError, match=r"blocks \[1, 2, 3\] are needed, this model holds \[0\]"):
        cut.tail(torch.zeros(1, 3, 16), torch.tensor([0]))
    with pytest.raises(ModelError, match=r"blocks \[1\] are needed"):
        Cut(head, 2).head(batch())


def test_a_part_without_sites_is_refused(tmp_path):
    folder = write(tmp_path / "base")
    with pytest.raises(SiteError, match="choose sites in every part"):
        load_model(folder, device="cpu", spans=HEAD, sites=["*.layers.3.*"])


def test_a_weight_that_is_needed_later_and_not_held_is_named():
    module = tiny("gpt2", n_layer=BLOCKS)
    module.transformer.ln_f.to("meta")
    cut = Cut(wrap_model(module, tiny_tokenizer()), 2)
    with pytest.raises(ModelError, match=r"transformer\.ln_f is needed after block 2"):
        cut.tail(torch.zeros(1, 3, 16), torch.tensor([0]))


def test_stored_tensors_are_those_that_safetensors_reads(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64]
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    stored = stored_tensors(path)
    assert stored.keys() == tensors.keys()
    for name, expected in load_file(path).items():
        assert stored[name][...].dtype == expected.dtype
        assert torch.equal(stored[name][...], expected)


@pytest.mark.parametrize("kept", [4, 60, -100])
def test_a_file_that_ends_early_is_told(tmp_path, kept):
    folder = write(tmp_path / "base")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_model(folder, device="cpu", spans=[Span()])
