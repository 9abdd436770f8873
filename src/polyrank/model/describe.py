"""A model's sites and sizes for planning, also on the meta device without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from polyrank.model.sites import ALL_LINEAR, choose_sites, find_blocks
from polyrank.planning.spec import ModelSpec

UNBOUNDED = 2**31 - 1
"""The context of a model that names no limit, such as one with ALiBi positions."""


def describe(
    module: PreTrainedModel,
    *,
    sites: Sequence[str] | str = ALL_LINEAR,
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> ModelSpec:
    """Return the model's sizes and its chosen sites; parameters that are shared count once.

    Raises ModelError if the decoder blocks cannot be found, SiteError as `choose_sites`.
    """
    config = module.config.get_text_config()
    return ModelSpec(
        architecture=type(module).__name__,
        sites=choose_sites(module, sites, exclude, groups),
        blocks=len(find_blocks(module).modules),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None) or UNBOUNDED,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
