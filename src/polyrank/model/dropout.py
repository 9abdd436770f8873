"""LoRA's dropout, with masks that depend on the slot's own work alone."""

from __future__ import annotations

import torch
from torch import Tensor

from polyrank.seeds import generator


def keep_mask(
    seed: int,
    draw: tuple[int, int],
    site: str,
    shape: tuple[int, int, int],
    probability: float,
    like: Tensor,
) -> Tensor:
    """Return 0 with the given probability and 1/(1−probability) otherwise, of shape b×T×n.

    `draw` is (optimizer step, microbatch). Every mask has a generator of its own, seeded by all
    arguments before `shape`: whoever draws it, and however often (activation checkpointing draws it
    twice), it is the same. b and T are the slot's own rows and longest row, before any padding.
    Dtype and device are those of `like`; another device draws another mask.
    """
    source = generator(seed, "dropout", *draw, site, device=like.device)
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    mask.bernoulli_(1.0 - probability, generator=source)
    return mask.div_(1.0 - probability)
