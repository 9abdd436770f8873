"""Encoding and collation: what goes in comes out, with the loss exactly on completion and end."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import BOS, CHATML, EOS, byte_tokenizer
from polyrank.data import Encoded, Example, collate, encode

texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
filled = texts.filter(str.strip)
examples = st.lists(
    st.builds(
        lambda prompt, input, answer, row: Example(prompt, (answer,), row, {}, input),
        filled,
        texts,
        filled,
        st.integers(0, 99),
    ),
    max_size=5,
)
PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(CHATML)


@settings(deadline=None, max_examples=60)
@given(examples, st.sampled_from([PLAIN, CHAT]))
def test_the_loss_is_on_the_completion_and_one_end_and_on_nothing_else(examples, tokenizer):
    rows, skipped = encode(examples, tokenizer, max_length=1000)
    assert skipped.count == 0
    assert [row.example for row in rows] == list(range(len(examples)))
    turn_end = "<stop>" if tokenizer is CHAT else ""
    for row, example in zip(rows, examples, strict=True):
        batch = collate([row], pad=EOS)
        carried = batch.labels[batch.labels != -100].tolist()
        assert tokenizer.decode(carried) == example.references[0] + turn_end + "</s>"
        assert carried.count(EOS) == 1
        assert row.targets == len(carried)
        prompt = row.input_ids[: row.prompt_length]
        assert prompt.count(BOS) == (tokenizer is PLAIN)
        assert example.prompt in tokenizer.decode(prompt)
        assert example.input in tokenizer.decode(prompt) or not example.input.strip()


@settings(deadline=None, max_examples=60)
@given(examples, st.integers(2, 120), st.sampled_from(["skip", "cut-prompt"]))
def test_nothing_is_longer_than_allowed_and_nothing_vanishes(examples, length, too_long):
    rows, skipped = encode(examples, PLAIN, max_length=length, too_long=too_long)
    assert len(rows) + skipped.count == len(examples)
    for row in rows:
        assert len(row.input_ids) <= length
        assert 0 < row.loss_from == row.prompt_length < len(row.input_ids)
        assert row.input_ids[0] == BOS
        answer = PLAIN.decode(row.input_ids[row.loss_from : -1])
        assert answer == examples[row.example].references[0]
        assert row.cut == 0 or len(row.input_ids) == length


rows_of_ids = st.lists(
    st.lists(st.integers(0, 50), min_size=2, max_size=9).flatmap(
        lambda ids: st.integers(1, len(ids) - 1).map(
            lambda start: Encoded(tuple(ids), start, start, 0)
        )
    ),
    min_size=1,
    max_size=6,
)


@given(rows_of_ids, st.integers(0, 50), st.integers(0, 4))
def test_collate_round_trips(rows, pad, extra):
    longest = max(len(row.input_ids) for row in rows)
    batch = collate(rows, pad, longest + extra)
    assert batch.input_ids.shape == (len(rows), longest + extra)
    for row, ids, mask, labels in zip(
        rows, batch.input_ids, batch.attention_mask, batch.labels, strict=True
    ):
        assert tuple(ids[mask.bool()].tolist()) == row.input_ids
        assert int(mask.sum()) == len(row.input_ids)
        assert torch.equal(mask, mask.sort(descending=True).values)  # padded on the right
        assert bool((ids[~mask.bool()] == pad).all())
        where = torch.nonzero(labels != -100).flatten().tolist()
        assert where == list(range(row.loss_from, len(row.input_ids)))
        assert torch.equal(labels[where], ids[where])
    assert batch.targets == sum(row.targets for row in rows)
