"""Encoded rows as a padded batch."""

import pytest
import torch

from polyrank.data import Encoded, collate
from polyrank.errors import DataError

ROWS = [Encoded((1, 5, 6, 2), 2, 2, 0), Encoded((1, 7), 1, 1, 1)]


def test_a_batch_is_padded_on_the_right_and_labels_are_where_the_loss_is():
    batch = collate(ROWS, pad=9)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 6, 2], [-100, 7, -100, -100]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}
    assert batch.targets == 3


def test_padding_with_a_token_of_the_text_changes_no_label_and_no_mask():
    ours, theirs = collate(ROWS, pad=2), collate(ROWS, pad=0)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)


def test_a_length_pads_further_and_refuses_to_cut():
    assert collate(ROWS, pad=0, length=6).input_ids.shape == (2, 6)
    with pytest.raises(DataError, match="4 tokens, the batch was to have 3"):
        collate(ROWS, pad=0, length=3)
    with pytest.raises(DataError, match="at least one example"):
        collate([], pad=0)
