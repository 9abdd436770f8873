"""A tokenizer with a token per byte, so that tests can read positions off the text."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, TURN, STOP = range(5)

CHATML = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def byte_tokenizer(
    chat: str | None = None, *, bos: bool = True, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Return one token per byte and <pad>, <s>, </s>, <turn>, <stop>; <s> first if `bos`."""
    special = ["<pad>", "<s>", "</s>", "<turn>", "<stop>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    names: dict[str, Any] = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": eos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat
    return tokenizer
