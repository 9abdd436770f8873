"""The order of a client's examples, and one batch from the rows of several clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.data.collate import IGNORED, collate
from polyrank.data.types import Encoded
from polyrank.seeds import generator
from polyrank.training.settings import LocalTraining


def step_groups(examples: int, local: LocalTraining, seed: int) -> Iterator[list[list[int]]]:
    """Yield the indices of the examples of each optimizer step, by microbatch.

    Every epoch is shuffled anew from (seed, epoch). Depends on nothing but the arguments: neither
    on the lengths of the examples nor on the cohort that the client trains in.
    """
    left = local.steps_for(examples)
    epoch = 0
    while left > 0:
        shuffled = torch.randperm(examples, generator=generator(seed, "order", epoch)).tolist()
        micro = [shuffled[i : i + local.batch] for i in range(0, examples, local.batch)]
        for i in range(0, len(micro), local.accumulation):
            if left > 0:
                yield micro[i : i + local.accumulation]
                left -= 1
        epoch += 1


@dataclass(frozen=True)
class TargetBatch:
    """Rows of several slots in one batch, with the places where tokens are predicted.

    `input_ids` is B×T. `positions` are the P indices into the flattened B·T whose hidden states
    predict the `targets` (P token ids), in the order of the rows.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def assemble(rows: Sequence[Encoded], pad: int, device: torch.device) -> TargetBatch:
    """Return the rows as one batch on the device; the token at t is predicted at t − 1."""
    batch = collate(rows, pad)
    labels = batch.labels[:, 1:]
    row, column = (labels != IGNORED).nonzero(as_tuple=True)
    return TargetBatch(
        input_ids=batch.input_ids.to(device),
        positions=(row * batch.input_ids.shape[1] + column).to(device),
        targets=labels[row, column].to(device),
    )
