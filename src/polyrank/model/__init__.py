"""The only importer of transformers and peft: loading, sites, LoRA layers, PEFT folders."""

from polyrank.model.cohort import Cohort, Part, Slot
from polyrank.model.describe import describe
from polyrank.model.forward import logits_at, target_losses
from polyrank.model.load import LoadedModel, load_model, wrap_model
from polyrank.model.sites import choose_sites, find_blocks

__all__ = [
    "Cohort",
    "LoadedModel",
    "Part",
    "Slot",
    "choose_sites",
    "describe",
    "find_blocks",
    "load_model",
    "logits_at",
    "target_losses",
    "wrap_model",
]
