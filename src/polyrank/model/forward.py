"""Running a model so that logits are computed only where a token is predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polyrank.errors import ModelError
from polyrank.model.load import LoadedModel


def logits_at(model: LoadedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Return the model's logits at the chosen positions, P×vocabulary.

    `input_ids` is B×T, padded on the right; `positions` are P indices into the flattened B·T. The
    hidden states are gathered on their way into the output embedding and the model's own forward
    finishes them, so that whatever it does to logits (Gemma 2's soft cap) is done. The attention
    mask is all ones: in a causal model a token never attends to the padding behind it, and the
    logits at padding are never computed, so the fast causal kernels need no mask. A row of padding
    alone does no harm, where a mask over all that a token may see can give NaN.

    Raises ModelError if the model has no output embedding or the gathered positions do not come
    out of it.
    """
    with gathered(model, positions):
        logits = model.module(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
        ).logits
    return checked_logits(model, logits, positions)


@contextmanager
def gathered(model: LoadedModel, positions: Tensor) -> Iterator[None]:
    """Let only the chosen positions into the output embedding while the context is entered.

    Raises ModelError if the model has no output embedding.
    """
    head = model.module.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model.module).__name__}: expected an output embedding, "
            f"get_output_embeddings() gave {head!r}"
        )

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).unsqueeze(0),)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def checked_logits(model: LoadedModel, logits: Tensor, positions: Tensor) -> Tensor:
    """Return what came out of a `gathered` model as P×vocabulary; ModelError if it is not that."""
    if logits.shape[:-1] != (1, len(positions)):
        raise ModelError(
            f"{type(model.module).__name__}: expected logits at {len(positions)} positions, got "
            f"{tuple(logits.shape)}; this model does not compute its logits by its output embedding"
        )
    return logits[0]
