"""The only importer of transformers and peft: loading, sites, LoRA layers, PEFT folders."""

from polyrank.model.anatomy import anatomy_of, load_bare
from polyrank.model.cohort import Cohort, Part, Share, Slot, applied
from polyrank.model.cut import Cut, side
from polyrank.model.describe import describe
from polyrank.model.forward import logits_at
from polyrank.model.generation import generate
from polyrank.model.load import LoadedModel, load_model, resolve_device, wrap_model
from polyrank.model.losses import losses_then_gradient, target_losses
from polyrank.model.merge import save_merged
from polyrank.model.peft_folder import load_adapter, save_adapter
from polyrank.model.sites import choose_sites, find_blocks
from polyrank.model.span import Span

__all__ = [
    "Cohort",
    "Cut",
    "LoadedModel",
    "Part",
    "Share",
    "Slot",
    "Span",
    "anatomy_of",
    "applied",
    "choose_sites",
    "describe",
    "find_blocks",
    "generate",
    "load_adapter",
    "load_bare",
    "load_model",
    "logits_at",
    "losses_then_gradient",
    "resolve_device",
    "save_adapter",
    "save_merged",
    "side",
    "target_losses",
    "wrap_model",
]
