"""Tiny random models of several architectures, and a tokenizer of whole words for them.

    module = tiny("gpt2", dtype=torch.float64)     # a transformers model, seeded
    model = tiny_loaded("llama")                   # the same as polyrank's LoadedModel
    folder = write_tiny(tmp_path / "base", "phi3") # model and tokenizer in a folder

Ids 0…3 are <pad>, <s>, </s> and <unk>, the others the words w4…w96. Weights are larger than a real
initialisation, so that a wrong sign or scale shows in the logits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from polyrank.algebra import Adapter, LowRank
from polyrank.model import LoadedModel, wrap_model

VOCABULARY = 97
PAD, BOS, EOS, UNK = range(4)

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_WIDE: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_WIDE, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"]

CONFIGS: Mapping[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 6}),
    "phi3": (Phi3Config, _GROUPED),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 4, "sliding_window": 4}),
    "gemma3": (
        Gemma3TextConfig,
        {**_GROUPED, "head_dim": 4, "sliding_window": 4, "layer_types": _ALTERNATING},
    ),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": 4}),
    "olmo2": (Olmo2Config, _GROUPED),
    "mixtral": (MixtralConfig, {**_GROUPED, "num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            **_GROUPED,
            "num_experts": 4,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, _WIDE),
    "gpt2": (GPT2Config, {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        OPTConfig,
        {
            **_TOKENS,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": (BloomConfig, {**_TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
}
"""Configurations by the name of the architecture; sizes divide evenly and differ where they can."""


def tiny(
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """Return a random model; `changes` override entries of its configuration."""
    kind, sizes = CONFIGS[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes}))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return module.to(dtype).eval()


def tiny_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of whole words; ``pad_token=None`` and the like take a token away."""
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK}
    words |= {f"w{i}": i for i in range(4, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | changes
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{name: token for name, token in special.items() if token}
    )


def tiny_loaded(
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sites: Sequence[str] | str = "all-linear",
    checkpointing: bool = False,
    **changes: Any,
) -> LoadedModel:
    """Return a random model as polyrank holds it."""
    module = tiny(architecture, dtype=dtype, seed=seed, **changes)
    return wrap_model(
        module, tiny_tokenizer(), sites=sites, checkpointing=checkpointing, source=architecture
    )


def write_tiny(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a random model with its tokenizer as a folder and return the folder."""
    tiny(architecture, dtype=dtype, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_adapter(
    model: LoadedModel,
    ranks: int | Mapping[str, int] = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Return an adapter with random factors of about unit products at the model's sites.

    `ranks` is one rank for all sites, or a rank per site (a site that is left out gets none).
    """
    generator = torch.Generator().manual_seed(seed)
    per_site = dict.fromkeys(model.spec.shapes, ranks) if isinstance(ranks, int) else ranks
    deltas = {}
    for site, rank in per_site.items():
        m, n = model.spec.shapes[site]
        b = torch.randn(m, rank, generator=generator, dtype=torch.float64) / m**0.5
        a = torch.randn(rank, n, generator=generator, dtype=torch.float64) / n**0.5
        deltas[site] = LowRank(b, a).to(dtype=dtype or model.dtype, device=model.device)
    return Adapter(deltas)


def batch(rows: int = 3, length: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Return random token ids without special tokens, rows×length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)
