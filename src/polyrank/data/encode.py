"""Examples as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from polyrank.data.template import Tokenizer, choose
from polyrank.data.types import Encoded, Example, Skipped
from polyrank.errors import DataError, ModelError, RecipeError

CHUNK = 512  # texts tokenised at once: enough for the tokenizer's threads, little memory
TOO_LONG = "too long"
ENDS_INSIDE = "end of sequence inside the completion"
EMPTY = "empty after tokenisation"

LossOn = Literal["completion", "all"]
TooLong = Literal["skip", "cut-prompt", "error"]


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    template: str = "auto",
    loss_on: LossOn = "completion",
    too_long: TooLong = "skip",
    label: str = "",
) -> tuple[list[Encoded], Skipped]:
    """Return each example as prompt, first reference and end of sequence, and what was left out.

    The prompt is rendered by the template (`template.choose`), with the tokenizer's own leading
    tokens unless the template writes them. The prompt's tokens are those that generation is given,
    and the completion's follow them; exactly one end of sequence closes it. The loss is on
    completion and end, or with `loss_on` ``all`` on every token but the first. Above `max_length`
    tokens an example is skipped, or an error, or its prompt loses tokens from its middle
    (``cut-prompt``: the instruction's start and the template's end stay).

    `label` goes before the row in messages. Raises ModelError for a tokenizer without end of
    sequence or with an unusable chat template, RecipeError for settings, DataError for ``error``.
    """
    skipped: dict[str, list[str]] = {}
    rows = encode_each(
        examples,
        tokenizer,
        skipped,
        max_length=max_length,
        template=template,
        loss_on=loss_on,
        too_long=too_long,
        label=label,
    )
    return list(rows), Skipped(skipped)


def encode_each(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    skipped: dict[str, list[str]],
    *,
    max_length: int,
    template: str = "auto",
    loss_on: LossOn = "completion",
    too_long: TooLong = "skip",
    label: str = "",
) -> Iterator[Encoded]:
    """Yield what `encode` returns, a chunk of examples at a time; `skipped` is added to on the way.

    Nothing is checked or read before the first row is asked for.
    """
    if loss_on not in ("completion", "all"):
        raise RecipeError(f"loss_on: expected completion or all, got {loss_on!r}")
    if too_long not in ("skip", "cut-prompt", "error"):
        raise RecipeError(f"too_long: expected skip, cut-prompt or error, got {too_long!r}")
    if max_length < 2:
        raise RecipeError(f"max_length: expected at least 2 tokens, got {max_length}")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "tokenizer: it has no end-of-sequence token, so completions could not end; set "
            "tokenizer.eos_token"
        )
    chosen = choose(template, tokenizer)
    leading = [] if chosen.whole else _leading(tokenizer)
    (after,) = _ids(tokenizer, [chosen.after]) if chosen.after else ([],)
    ends = after.count(eos)  # 0: the template leaves the end to us
    tail = chosen.after if ends else chosen.after.rstrip()

    shared: dict[int, int] = {}  # one integer object per token id, not per token
    for start in range(0, len(examples), CHUNK):
        chunk = list(examples[start : start + CHUNK])  # Read once, if they lie on disk.
        texts = chosen.prompts(chunk)
        answers = [chosen.before + example.references[0] + tail for example in chunk]
        prompts = _ids(tokenizer, texts)
        continued = _answers(tokenizer, texts, prompts, answers, chosen.whole)
        rows = zip(chunk, prompts, continued, strict=True)
        for index, (example, prompt, answer) in enumerate(rows, start=start):
            row = f"{label} row {example.row}".lstrip()
            if not answer or not (leading or prompt):
                skipped.setdefault(EMPTY, []).append(row)
                continue
            if answer.count(eos) > ends:
                skipped.setdefault(ENDS_INSIDE, []).append(row)
                continue
            answer = [*answer[: answer.index(eos)], eos] if eos in answer else [*answer, eos]
            surplus = len(leading) + len(prompt) + len(answer) - max_length
            if surplus > 0 and too_long == "error":
                raise DataError(
                    f"{row}: {surplus + max_length} tokens, expected at most {max_length}; raise "
                    "max_length or choose too_long = skip or cut-prompt"
                )
            room = max_length - len(leading) - len(answer)
            if surplus > 0 and (too_long == "skip" or room < (0 if leading else 1)):
                skipped.setdefault(TOO_LONG, []).append(row)
                continue
            cut = max(surplus, 0)
            if cut:
                head = (room + 1) // 2
                prompt = prompt[:head] + prompt[head + cut :]
            length = len(leading) + len(prompt)
            yield Encoded(
                input_ids=tuple(shared.setdefault(t, t) for t in leading + prompt + answer),
                prompt_length=length,
                loss_from=length if loss_on == "completion" else 1,
                example=index,
                cut=cut,
            )


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text alone, without tokens that the tokenizer would add."""
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _answers(
    tokenizer: Tokenizer,
    texts: list[str],
    prompts: list[list[int]],
    answers: list[str],
    whole: bool,
) -> list[list[int]]:
    """Return the ids of each answer: what continues the prompt's ids in the ids of both together.

    Where a token would reach over the border, or without `whole`, of the answer by itself.
    """
    if not whole:
        return _ids(tokenizer, answers)
    joined = _ids(tokenizer, [text + answer for text, answer in zip(texts, answers, strict=True)])
    apart = [ids[: len(prompt)] != prompt for ids, prompt in zip(joined, prompts, strict=True)]
    alone = iter(_ids(tokenizer, [a for a, border in zip(answers, apart, strict=True) if border]))
    return [
        next(alone) if border else ids[len(prompt) :]
        for ids, prompt, border in zip(joined, prompts, apart, strict=True)
    ]


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Return [bos] if the tokenizer puts one before a text, otherwise nothing."""
    bos = tokenizer.bos_token_id
    added = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    return [bos] if bos is not None and list(added[:1]) == [bos] else []
