"""A fleet of eight clients on four blocks, most of them cut: at several places, and one-sided."""

from federations import SITES, clients
from models import tiny_loaded
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint, Fleet, LoRAType

BLOCKS = 4
TYPES = {
    "near": LoRAType("near", {"all": 2}),
    "far": LoRAType("far", {"attention": 3, "feed-forward": 1}),
    "around": LoRAType("around", {"all": 3}),
    "whole": LoRAType("whole", {"all": 2}),
    "last": LoRAType("last", {"model.layers.3.mlp.down_proj": 2}),  # nothing to train at the client
    "first": LoRAType("first", {"model.layers.0.self_attn.q_proj": 2}),  # nothing at the server
}
CUTS = {
    "near": CutPoint(1),
    "far": CutPoint(3),
    "around": CutPoint(1, 3),
    "last": CutPoint(2),
    "first": CutPoint(2),
}
SPLIT_DATA = clients(seen=8, unseen=0)
NAMES = ("near", "near", "far", "around", "around", "whole", "last", "first")
WHO = dict(zip(sorted(SPLIT_DATA), NAMES, strict=True))
SPLIT_FLEET = Fleet.table(WHO, types=TYPES, cuts=CUTS)


def four_blocks() -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=BLOCKS, sites=SITES)
