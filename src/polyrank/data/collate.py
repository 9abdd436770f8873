"""Encoded examples, put together into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

from polyrank.data.types import Batch, Encoded
from polyrank.errors import DataError
from polyrank.lazy_torch import torch

IGNORED = -100  # the label that torch's cross entropy leaves out


def collate(rows: Sequence[Encoded], pad: int, length: int | None = None) -> Batch:
    """Return the rows padded on the right with `pad` to the longest, or to `length` tokens.

    The attention mask, not the value of `pad`, says where the padding is, so `pad` may be a token
    that also occurs in the text. Raises DataError if there is no row or one is above `length`.
    """
    if not rows:
        raise DataError("collate: expected at least one example, got none")
    longest = max(len(row.input_ids) for row in rows)
    width = longest if length is None else length
    if longest > width:
        raise DataError(
            f"collate: an example has {longest} tokens, the batch was to have {width}; encode with "
            f"max_length={width} first"
        )
    ids, mask, labels = [], [], []
    for row in rows:
        size = len(row.input_ids)
        padding = width - size
        ids.append([*row.input_ids, *[pad] * padding])
        mask.append([1] * size + [0] * padding)
        targets = row.input_ids[row.loss_from :]
        labels.append([IGNORED] * row.loss_from + [*targets] + [IGNORED] * padding)
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))
