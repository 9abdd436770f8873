"""Cross entropy in few passes over the logits, which are by far the largest tensor of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_CPU = 2**18
_CHUNK_ELSEWHERE = 2**25
"""Logits looked at together: few enough for the caches of a CPU, many enough for a GPU."""


@torch.no_grad()
def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −log p(target) of each of P rows, in float32 (float64 for float64 logits).

    `logits` is P×vocabulary and stays as it is; `targets` holds P token ids. No gradient.
    """
    losses = torch.empty(len(logits), dtype=_exact(logits), device=logits.device)
    for rows in _chunks(logits):
        log_p = torch.log_softmax(logits[rows], dim=-1, dtype=losses.dtype)
        losses[rows] = -log_p.gather(1, targets[rows, None])[:, 0]
    return losses


@torch.no_grad()
def losses_then_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the same losses, and overwrite the logits by the gradient of Σ weight·loss.

        ∂/∂logits = weight · (softmax(logits) − one-hot(target))

    computed in float32 (float64 for float64 logits) and rounded to the logits' dtype once. Go on
    with ``logits.backward(logits.detach())``. Against cross entropy under autograd this saves the
    memory of two to three more tensors of P×vocabulary, and most of its time on a CPU. If the last
    operation of a model needed its own output for its gradient, autograd would refuse.
    """
    losses = torch.empty(len(logits), dtype=_exact(logits), device=logits.device)
    overwritten = logits.detach()
    for rows in _chunks(logits):
        target = targets[rows, None]
        log_p = torch.log_softmax(overwritten[rows], dim=-1, dtype=losses.dtype)
        losses[rows] = -log_p.gather(1, target)[:, 0]
        gradient = log_p.exp_()
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        overwritten[rows] = gradient.mul_(weights[rows, None])
    return losses


def _exact(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> Iterator[slice]:
    elements = _CHUNK_CPU if logits.device.type == "cpu" else _CHUNK_ELSEWHERE
    size = max(1, elements // max(1, logits.shape[1]))
    for first in range(0, len(logits), size):
        yield slice(first, first + size)
