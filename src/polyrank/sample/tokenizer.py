"""The tokenizer of the miniature: byte-level-safe BPE in which a word is mostly one token."""

from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer whose words look the same after a space, a line break and at the start.

    A word mark ``▁`` stands before every word, as in Llama's tokenizer, and also after a line
    break, so that an answer on a line of its own is the token that prose knows.
    """
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\n(?=[^\s])"), "\n "),
            normalizers.Replace(Regex(r"\A(?=[^\s])"), " "),
            normalizers.Replace(" ", "▁"),
        ]
    )
    pattern = Regex(r"▁?[A-Za-z]+|▁?[0-9]+|\n+|▁?#+|▁?[^\sA-Za-z0-9▁]|▁")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("\n ", "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(token, special=True) for token in (PAD, BOS, EOS)]
    byte_tokens = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*special, *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=256
    )
