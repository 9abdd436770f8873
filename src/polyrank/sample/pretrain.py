"""Pretraining of the miniature base: next-token prediction on the world's own text."""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, HIDDEN, LAYERS, HEADS = 128, 352, 4, 4
CONTEXT, BATCH = 128, 16
PEAK_RATE, WARMUP = 3e-3, 150


def blank_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about one million parameters with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, size: int = BATCH
) -> Iterator[torch.Tensor]:
    """Pack ``<s> text </s>`` end to end into integer batches of shape ``(size, CONTEXT)``."""
    stream: list[int] = []
    pending: list[str] = []
    for paragraph in texts:
        pending.append(paragraph)
        if len(pending) < 256:
            continue
        for ids in tokenizer(pending, add_special_tokens=False)["input_ids"]:
            stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        pending = []
        while len(stream) >= size * CONTEXT:
            yield torch.tensor(stream[: size * CONTEXT]).view(size, CONTEXT)
            stream = stream[size * CONTEXT :]


def rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine to a fiftieth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    steps: int,
    report: Callable[[str], None] = print,
) -> float:
    """Train ``model`` in place with AdamW; return the mean loss of the last fifty steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    for step in range(steps):
        ids = next(data)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            mean = sum(losses[-50:]) / 50
            report(f"step {step + 1} loss {mean:.3f} seconds {time.monotonic() - began:.0f}")
    tail = losses[-50:]
    return sum(tail) / len(tail)
