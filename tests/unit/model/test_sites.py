import pytest
import torch
from torch import nn

from models import CONFIGS, batch, tiny
from polyrank.errors import ModelError, SiteError
from polyrank.model.sites import choose_sites, find_blocks, linear_shape

SITES = {
    # module paths within a block: (m, n, group)
    "llama": {
        "self_attn.q_proj": (16, 16, "attention"),
        "self_attn.k_proj": (8, 16, "attention"),
        "self_attn.v_proj": (8, 16, "attention"),
        "self_attn.o_proj": (16, 16, "attention"),
        "mlp.gate_proj": (24, 16, "feed-forward"),
        "mlp.up_proj": (24, 16, "feed-forward"),
        "mlp.down_proj": (16, 24, "feed-forward"),
    },
    "gpt2": {
        "attn.c_attn": (48, 16, "attention"),
        "attn.c_proj": (16, 16, "attention"),
        "mlp.c_fc": (64, 16, "feed-forward"),
        "mlp.c_proj": (16, 64, "feed-forward"),
    },
    "phi3": {
        "self_attn.o_proj": (16, 16, "attention"),
        "self_attn.qkv_proj": (32, 16, "attention"),
        "mlp.gate_up_proj": (48, 16, "feed-forward"),
        "mlp.down_proj": (16, 24, "feed-forward"),
    },
    "gpt_neox": {
        "attention.query_key_value": (48, 16, "attention"),
        "attention.dense": (16, 16, "attention"),
        "mlp.dense_h_to_4h": (24, 16, "feed-forward"),
        "mlp.dense_4h_to_h": (16, 24, "feed-forward"),
    },
    "opt": {
        "self_attn.k_proj": (16, 16, "attention"),
        "self_attn.v_proj": (16, 16, "attention"),
        "self_attn.q_proj": (16, 16, "attention"),
        "self_attn.out_proj": (16, 16, "attention"),
        "fc1": (24, 16, "feed-forward"),
        "fc2": (16, 24, "feed-forward"),
    },
    "qwen2_moe": {  # without router, experts and the gate of the shared expert
        "self_attn.q_proj": (16, 16, "attention"),
        "self_attn.k_proj": (8, 16, "attention"),
        "self_attn.v_proj": (8, 16, "attention"),
        "self_attn.o_proj": (16, 16, "attention"),
        "mlp.shared_expert.gate_proj": (28, 16, "feed-forward"),
        "mlp.shared_expert.up_proj": (28, 16, "feed-forward"),
        "mlp.shared_expert.down_proj": (16, 28, "feed-forward"),
    },
}
SITES["gemma2"] = SITES["llama"]
SITES["mixtral"] = {name: of for name, of in SITES["llama"].items() if "attn" in name}
SITES["bloom"] = {
    "self_attention.query_key_value": (48, 16, "attention"),
    "self_attention.dense": (16, 16, "attention"),
    "mlp.dense_h_to_4h": (64, 16, "feed-forward"),
    "mlp.dense_4h_to_h": (16, 64, "feed-forward"),
}


@pytest.mark.parametrize("architecture", SITES)
def test_all_linear_is_every_linear_layer_of_the_blocks_with_its_group(architecture):
    module = tiny(architecture)
    prefix = find_blocks(module).prefix
    found = [(s.name, s.block, s.m, s.n, s.group) for s in choose_sites(module)]
    assert found == [
        (f"{prefix}.{block}.{name}", block, *of)
        for block in range(2)
        for name, of in SITES[architecture].items()
    ]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_shapes_are_those_of_what_goes_through(architecture):
    module = tiny(architecture)
    seen = {}
    for site in choose_sites(module):
        module.get_submodule(site.name).register_forward_hook(
            lambda _, x, y, s=site: seen.update({s.name: (y.shape[-1], x[0].shape[-1])})
        )
    with torch.no_grad():
        module(batch())
    assert seen == {site.name: site.shape for site in choose_sites(module)}


def names(module, *args, **kwargs):
    prefix = find_blocks(module).prefix + "."
    return [site.name.removeprefix(prefix) for site in choose_sites(module, *args, **kwargs)]


def test_sites_by_suffix_path_and_glob_come_in_the_models_order():
    module = tiny("llama")
    assert names(module, ["v_proj", "q_proj"]) == [
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]
    assert names(module, "model.layers.1.mlp.up_proj") == ["1.mlp.up_proj"]
    assert names(module, ["*.1.mlp.*_proj"], ["up_proj"]) == ["1.mlp.gate_proj", "1.mlp.down_proj"]


def test_exclude_takes_away_from_all_linear():
    left = names(tiny("gpt2"), "all-linear", ["attn.c_proj", "*.1.*"])
    assert left == ["0.attn.c_attn", "0.mlp.c_fc", "0.mlp.c_proj"]


def test_a_suffix_that_stands_for_two_places_is_ambiguous_and_lists_them():
    module = tiny("gpt2")
    with pytest.raises(SiteError) as caught:
        choose_sites(module, ["c_proj"])
    told = str(caught.value)
    assert "transformer.h.*.attn.c_proj, transformer.h.*.mlp.c_proj" in told
    assert "'attn.c_proj' or 'mlp.c_proj'" in told
    assert "'*.c_proj'" in told
    assert names(module, ["mlp.c_proj"]) == ["0.mlp.c_proj", "1.mlp.c_proj"]
    assert len(names(module, ["*.c_proj"])) == 4


def test_a_name_without_a_match_lists_what_there_is():
    with pytest.raises(
        SiteError, match=r"'q_prj' matches no.*model\.layers\.\*\.self_attn\.q_proj"
    ):
        choose_sites(tiny("llama"), ["q_prj"])
    with pytest.raises(SiteError, match="matches no"):  # part of a component is no suffix
        choose_sites(tiny("llama"), ["proj"])


@pytest.mark.parametrize(
    ("architecture", "name", "reason"),
    [
        ("llama", "lm_head", "outside the decoder blocks"),
        ("llama", "embed_tokens", "outside the decoder blocks"),
        ("mixtral", "experts", "only the tokens that are routed"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "only the tokens that are routed"),
        ("qwen2_moe", "shared_expert_gate", "routes tokens"),
        ("qwen2_moe", "*.experts", "only the tokens that are routed"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_reason(architecture, name, reason):
    with pytest.raises(SiteError, match=f"cannot be adapted.*{reason}"):
        choose_sites(tiny(architecture), [name])


def test_nothing_left_is_an_error():
    with pytest.raises(SiteError, match="nothing is left"):
        choose_sites(tiny("llama"), ["q_proj"], ["*.self_attn.*"])
    with pytest.raises(SiteError, match="nothing is left"):
        choose_sites(tiny("llama"), [])


def test_groups_can_be_overridden_and_added():
    module = tiny("llama")
    groups = {"attention": ["*.[qk]_proj"], "rest": ["*.[vo]_proj"]}
    found = {s.name.rsplit(".", 1)[-1]: s.group for s in choose_sites(module, groups=groups)}
    assert found["q_proj"] == "attention"
    assert found["v_proj"] == "rest"
    assert found["up_proj"] == "feed-forward"


def test_sites_in_no_group_or_in_two_are_all_listed():
    module = tiny("llama")
    with pytest.raises(SiteError) as caught:
        choose_sites(module, groups={"attention": ["*.[qkv]_proj", "*.up_proj"]})
    told = str(caught.value)
    assert "model.layers.*.self_attn.o_proj in none" in told
    assert "model.layers.*.mlp.up_proj in attention and feed-forward" in told
    assert "q_proj in" not in told


def test_a_list_of_experts_inside_a_block_is_no_site():
    module = tiny("llama")
    for block in module.model.layers:
        block.mlp.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        block.mlp.router = nn.Linear(16, 3)
    assert names(module) == names(tiny("llama"))
    with pytest.raises(SiteError, match="routes tokens"):
        choose_sites(module, ["router"])
    with pytest.raises(SiteError, match="expert"):
        choose_sites(module, ["experts.0"])


def test_a_model_without_a_list_of_blocks_is_refused():
    module = tiny("llama")
    module.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"hidden layers \(5\), found none"):
        find_blocks(module)


def test_conv1d_shape_is_out_by_in():
    assert linear_shape(tiny("gpt2").transformer.h[0].mlp.c_fc) == (64, 16)
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
