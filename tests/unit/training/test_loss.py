"""Logits only where tokens are predicted: the same numbers as the whole model's."""

import pytest
import torch

from jobs import examples
from models import PAD, VOCABULARY, random_adapter, tiny_loaded
from polyrank.data.collate import collate
from polyrank.errors import ModelError
from polyrank.model import logits_at, losses_then_gradient, target_losses
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


@pytest.mark.parametrize("rows", [1, 5000])  # more than one chunk of rows on a CPU
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_their_gradient_are_those_of_cross_entropy(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(rows, generator=generator, dtype=exact)
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf.to(exact), targets, reduction="none")
    (expected * weights).sum().backward()
    found = target_losses(logits, targets)
    assert found.dtype == exact
    torch.testing.assert_close(found, expected.detach())
    overwritten = logits.clone()
    torch.testing.assert_close(losses_then_gradient(overwritten, targets, weights), found)
    torch.testing.assert_close(overwritten, leaf.grad)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_backward_from_overwritten_logits_is_backward_of_the_loss(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    put = assemble(examples(3), PAD, model.device)
    weights = torch.rand(len(put.targets), dtype=torch.float64)
    weight = model.module.get_input_embeddings().weight.requires_grad_()
    logits = logits_at(model, put.input_ids, put.positions)
    losses_then_gradient(logits, put.targets, weights)
    logits.backward(logits.detach())
    ours, weight.grad = weight.grad, None
    logits = logits_at(model, put.input_ids, put.positions)
    losses = torch.nn.functional.cross_entropy(logits, put.targets, reduction="none")
    (losses * weights).sum().backward()
    torch.testing.assert_close(ours, weight.grad, rtol=0, atol=1e-12)


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
