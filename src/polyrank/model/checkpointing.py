"""Activation checkpointing of the decoder blocks, without switching the model to training mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make every block keep its inputs only and compute itself again in the backward pass.

    The checkpointing of transformers works in training mode only, where a model's own dropouts
    (0.1 in GPT-2) are active too. Here the forward method of each block is wrapped, so that the
    model stays in evaluation mode and its values and gradients are those without checkpointing.
    Hooks on a block itself run once, hooks on modules inside a block twice: what they do at random
    must be the same both times. Without gradients (generation) nothing changes.
    """
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
