"""Greedy generation of text, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from transformers import GenerationConfig

from polyrank.algebra import Adapter
from polyrank.errors import DataError
from polyrank.model.cohort import applied
from polyrank.model.load import LoadedModel


def generate(
    model: LoadedModel,
    adapter: Adapter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int = 16,
    on_batch: Callable[[], None] | None = None,
) -> list[str]:
    """Return the greedy continuation of every prompt, in the order of the prompts.

    Prompts are token ids. Each continuation ends at an end-of-sequence token, the tokenizer's or
    one that the model's own generation settings name, or after `max_new_tokens`; special tokens are
    left out of the text. Nothing else of the model's generation settings (sampling, penalties) has
    an effect, and they are not changed. Prompts of similar length share a batch of at most `batch`.
    `adapter` may lack sites, and None is the bare base. `on_batch` is called before each batch.

    Raises DataError for an empty prompt or one that with `max_new_tokens` exceeds the context;
    SiteError if the adapter does not fit the model.
    """
    if max_new_tokens < 1 or batch < 1:
        raise DataError(
            f"generate: expected max_new_tokens and batch of at least 1, got {max_new_tokens} and "
            f"{batch}"
        )
    room = model.spec.context - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise DataError(
                f"generate: prompt {number} has {len(prompt)} tokens; expected 1 to {room}, the "
                f"context of {model.spec.context} less {max_new_tokens} new ones"
            )
    texts = [""] * len(prompts)
    with applied(model, adapter):
        for chosen in _batches(prompts, batch, pad=model.dtype != torch.float64):
            if on_batch is not None:
                on_batch()
            answers = _generate_batch(model, [prompts[i] for i in chosen], max_new_tokens)
            for i, text in zip(chosen, answers, strict=True):
                texts[i] = text
    return texts


def _batches(prompts: Sequence[Sequence[int]], batch: int, *, pad: bool) -> Iterator[list[int]]:
    """Yield the prompts' indices by length, at most `batch` at once; of one length unless `pad`.

    Padding on the left gives rows of attention in which everything is masked. In float64 the eager
    attention of transformers makes NaN of them (the mask's finfo(float64).min is -inf once it takes
    its softmax in float32), and NaN spreads from padding to text.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    same = (list(group) for _, group in groupby(order, key=lambda i: len(prompts[i])))
    for run in [order] if pad else same:
        for first in range(0, len(run), batch):
            yield run[first : first + batch]


@torch.no_grad()
def _generate_batch(
    model: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    tokenizer, module = model.tokenizer, model.module
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    own = module.generation_config
    # The settings that come with a model would fill in what ours leave open, so they step aside.
    module.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=_ends(own, tokenizer.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        out = module.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    finally:
        module.generation_config = own
    return tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


def _ends(own: GenerationConfig, eos: int) -> list[int]:
    named = own.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({eos, *others})
