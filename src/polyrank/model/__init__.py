"""The only importer of transformers and peft: loading, sites, LoRA layers, PEFT folders."""

from polyrank.model.describe import describe
from polyrank.model.load import LoadedModel, load_model, wrap_model
from polyrank.model.sites import choose_sites, find_blocks

__all__ = [
    "LoadedModel",
    "choose_sites",
    "describe",
    "find_blocks",
    "load_model",
    "wrap_model",
]
