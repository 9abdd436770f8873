"""The loss of an adapter on examples, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from polyrank.algebra import Adapter
from polyrank.data.tokens import sizes
from polyrank.data.types import Encoded
from polyrank.model import LoadedModel, applied, logits_at, target_losses
from polyrank.training.batches import assemble


@torch.no_grad()
def token_losses(
    model: LoadedModel,
    adapter: Adapter | None,
    encoded: Sequence[Encoded],
    batch: int,
    on_batch: Callable[[], None] | None = None,
) -> list[tuple[float, int]]:
    """Return (summed loss, target tokens) of every example, in the order given.

    `adapter` may lack sites and have any rank; None means the bare base. Examples of like length
    are batched together, `batch` at a time, and read then if they lie on disk; a mean over examples
    is Σ loss / Σ tokens. `on_batch` is called before each batch. Raises SiteError if the adapter
    does not fit.
    """
    loss_sums: list[tuple[float, int]] = [(0.0, 0)] * len(encoded)
    lengths = [size.tokens for size in sizes(encoded)]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    with applied(model, adapter):
        for first in range(0, len(order), batch):
            if on_batch is not None:
                on_batch()
            chosen = order[first : first + batch]
            rows = [encoded[i] for i in chosen]
            put = assemble(rows, model.tokenizer.pad_token_id, model.device)
            losses = target_losses(logits_at(model, put.input_ids, put.positions), put.targets)
            parts = losses.double().split([row.targets for row in rows])
            sums = torch.stack([part.sum() for part in parts]).tolist()
            for i, total, row in zip(chosen, sums, rows, strict=True):
                loss_sums[i] = (total, row.targets)
    return loss_sums
