"""Logits only where tokens are predicted: the same numbers as the whole model's."""

import pytest
import torch

from jobs import examples
from models import PAD, VOCABULARY, random_adapter, tiny_loaded
from polyrank.data.collate import collate
from polyrank.errors import ModelError
from polyrank.model import logits_at, target_losses
from polyrank.training import token_losses
from polyrank.training.batches import assemble

ARCHITECTURES = ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "opt", "bloom"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gathered_loss_is_the_models_own_loss_with_labels(architecture):
    model = tiny_loaded(architecture)
    rows = examples(5)
    whole = collate(rows, PAD)
    own = model.module(
        input_ids=whole.input_ids, attention_mask=whole.attention_mask, labels=whole.labels
    ).loss
    put = assemble(rows, PAD, model.device)
    losses = target_losses(logits_at(model, put.input_ids, put.positions), put.targets)
    assert losses.mean().item() == pytest.approx(own.item(), rel=2e-6)  # both in float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gathered_logits_are_those_of_each_row_alone_without_padding(architecture):
    """In float64, where only a real difference shows; the caps of Gemma 2 are among them.

    The rows alone are the oracle: with an attention mask, a window of 4 and float64 the model's own
    padded batch has NaN in it.
    """
    model = tiny_loaded(architecture, dtype=torch.float64)
    rows = examples(5)
    alone = [
        model.module(torch.tensor([row.input_ids])).logits[0, row.loss_from - 1 : -1]
        for row in rows
    ]
    put = assemble(rows, PAD, model.device)
    gathered = logits_at(model, put.input_ids, put.positions)
    torch.testing.assert_close(gathered, torch.cat(alone), rtol=0, atol=1e-11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_padding_alone_do_no_harm(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    put = assemble(examples(3), PAD, model.device)
    alone = logits_at(model, put.input_ids, put.positions)
    padding = torch.full((2, put.input_ids.shape[1]), PAD)
    beside = logits_at(model, torch.cat([put.input_ids, padding]), put.positions)
    assert beside.isfinite().all()
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-11)


def test_the_hook_on_the_head_is_gone_afterwards_also_after_an_error():
    model = tiny_loaded("llama")
    head = model.module.get_output_embeddings()
    put = assemble(examples(3), PAD, model.device)
    logits_at(model, put.input_ids, put.positions)
    assert not head._forward_pre_hooks
    with pytest.raises(IndexError):
        logits_at(model, put.input_ids, torch.tensor([10_000]))
    assert not head._forward_pre_hooks


def test_a_model_that_bypasses_its_output_embedding_is_refused(monkeypatch):
    model = tiny_loaded("llama")
    put = assemble(examples(3), PAD, model.device)
    other = torch.nn.Linear(16, VOCABULARY)
    monkeypatch.setattr(model.module, "get_output_embeddings", lambda: other)
    with pytest.raises(ModelError, match="by its output embedding"):
        logits_at(model, put.input_ids, put.positions)
    monkeypatch.setattr(model.module, "get_output_embeddings", lambda: None)
    with pytest.raises(ModelError, match="expected an output embedding"):
        logits_at(model, put.input_ids, put.positions)


def test_losses_are_float32_for_bfloat16_logits():
    logits, targets = torch.randn(6, 11).bfloat16(), torch.arange(6)
    losses = target_losses(logits, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses, torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    )
    assert target_losses(logits.double(), targets).dtype == torch.float64


def test_token_losses_come_in_the_order_given_whatever_the_batch():
    model = tiny_loaded("qwen3", dtype=torch.float64)
    adapter = random_adapter(model, 3)
    rows = examples(9, seed=3)
    one_by_one = [token_losses(model, adapter, [row], 1)[0] for row in rows]
    for size in (2, 4, 16):
        together = token_losses(model, adapter, rows, size)
        assert [count for _, count in together] == [row.targets for row in rows]
        for (loss, _), (expected, _) in zip(together, one_by_one, strict=True):
            assert loss == pytest.approx(expected, rel=1e-12)


def test_token_losses_of_no_adapter_are_the_bare_bases():
    model = tiny_loaded("llama", dtype=torch.float64)
    rows = examples(4)
    bare = token_losses(model, None, rows, 4)
    silent = token_losses(model, random_adapter(model, 2).scale(0.0), rows, 4)
    assert bare == silent
    assert token_losses(model, random_adapter(model, 2), rows, 4) != bare
    assert token_losses(model, None, [], 4) == []
