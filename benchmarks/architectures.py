"""Which architectures were tried, and with which outcome: docs/explanation/architectures.md.

    python benchmarks/architectures.py [--only llama,gpt2] [--write PAGE]

Every architecture is a random model of three blocks, 32 wide, in float64. Four things are tried:

- *cohort*: two clients of ranks 2 and 3 and unequal rows train a step in one pass; logits and all
  new factors equal those of peft, client by client;
- *cut*: at every block, the two parts, which exchange nothing but hidden states and their
  gradients, give the loss and the new factors of the whole model;
- *plan*: from the configuration alone, a client's memory is predicted, whole and at every cut;
- *export*: the adapter is written, and read back by peft and by polyrank; peft's logits are those
  of the run.

A try ends with ``yes``; with ``refused``, an error of polyrank's that says why; with ``WRONG``,
other numbers; or with ``fails``, another error. Numbers agree if they differ by at most 1e-5 of the
largest: models are in float64, but some architectures compute attention, norms or routers in
float32 whatever the model is in.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from polyrank.algebra import Adapter, LowRank
from polyrank.errors import PolyrankError
from polyrank.model import (
    Cohort,
    Cut,
    LoadedModel,
    Part,
    Slot,
    load_adapter,
    logits_at,
    save_adapter,
    wrap_model,
)
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CostModel, CutPoint
from polyrank.planning.workload import Workload

VOCABULARY, BLOCKS, LENGTHS = 97, 3, (9, 6, 4)
TOLERANCE = 1e-5
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}

DENSE: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "cohere": {},
    "cohere2": {"head_dim": 8, "sliding_window": 4},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": 4},
    "falcon": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": 64},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 4},
}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4},
    "granitemoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "qwen3_next": {
        **EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "minicpm3": LATENT,
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "jamba": {
        "num_experts": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "attention_window_size": 4},
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 8, "sliding_window": 4},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        "head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
}
EXCLUDE_MLP = {"exclude": ["*mlp*"]}
MIXERS = {"groups": {"attention": ["*attn*", "*mamba*"]}}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"exclude": ["*mlp*", "kv_b_proj"]},
    "deepseek_v3": {"exclude": ["*mlp*", "kv_b_proj"]},
    "ernie4_5_moe": EXCLUDE_MLP,
    "glm4_moe": EXCLUDE_MLP,
    "qwen3_next": EXCLUDE_MLP,
    "minicpm3": {"exclude": ["kv_b_proj"]},
    "bamba": MIXERS,
    "falcon_h1": MIXERS,
    "granitemoehybrid": MIXERS,
    "lfm2": {"groups": {"attention": ["*attn*", "*conv*"]}},
    "mamba2": {"groups": {"attention": ["*mixer*"]}},
    "recurrent_gemma": {"groups": {"attention": ["*temporal_block*"]}},
}
"""Settings of `[model]` with which some of these do better."""

FAMILIES = {"Dense decoders": DENSE, "Mixtures, latent attention, state-space and others": OTHERS}


@dataclass(frozen=True)
class Outcome:
    """How a try ended, in a word, and why."""

    word: str
    reason: str = ""


class Different(Exception):
    """Two numbers that must agree do not."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    only = options.only.split(",") if options.only else None
    parts, started = [], time.monotonic()
    for title, family in FAMILIES.items():
        rows = {
            f"`{name}`": tried(name, sizes)
            for name, sizes in family.items()
            if not only or name in only
        }
        parts.append(table(title, rows))
    rows = {
        f"`{name}`, `{key} = {json.dumps(value)}`": tried(name, OTHERS[name], **{key: value})
        for name, setting in SETTINGS.items()
        for key, value in setting.items()
        if not only or name in only
    }
    parts.append(table("Some of these, with a setting in `[model]`", rows))
    text = "\n\n".join(part for part in parts if part)
    print(f"{text}\n\n{time.monotonic() - started:.0f} s")
    if options.write:
        insert(options.write, text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--write", type=Path, help="a page, between whose marks the table is put")
    return parser.parse_args()


def tried(name: str, sizes: Mapping[str, Any], **setting: Any) -> dict[str, Outcome]:
    """Return the outcome of each try; all are that of making the model, if that fails."""
    tries: Mapping[str, Callable[[LoadedModel], None]] = {
        "cohort": try_cohort,
        "cut": try_cut,
        "plan": try_plan,
        "export": try_export,
    }
    made: list[LoadedModel] = []
    first = outcome(lambda: made.append(loaded(name, sizes, **setting)))
    if first.word != "yes":
        return dict.fromkeys(tries, first)
    return {key: outcome(lambda run=run: run(made[0])) for key, run in tries.items()}


def outcome(run: Callable[[], None]) -> Outcome:
    try:
        run()
    except Different as error:
        return Outcome("WRONG", str(error))
    except PolyrankError as error:
        said = " ".join(str(error).split())
        return Outcome("refused", re.sub(r"^(\w+For\w+|/\S+): ", "", said))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("fails", f"{said[:160]} ({Path(place.filename).name}:{place.lineno})")
    return Outcome("yes")


def loaded(name: str, sizes: Mapping[str, Any], **setting: Any) -> LoadedModel:
    """Return a random model whose weights are larger than at a real start, so that errors show."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**SIZES, **sizes})
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    module: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.3 / parameter.shape[-1] ** 0.5 * 4)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        f"w{i}": i for i in range(4, VOCABULARY)
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    return wrap_model(module.to(torch.float64).eval(), tokenizer, source=name, **setting)


def adapter_of(model: LoadedModel, rank: int) -> Adapter:
    """Return an adapter with random factors at all sites."""
    generator = torch.Generator().manual_seed(rank)
    return Adapter(
        {
            site: LowRank(
                torch.randn(m, rank, generator=generator, dtype=torch.float64) / m**0.5,
                torch.randn(rank, n, generator=generator, dtype=torch.float64) / n**0.5,
            )
            for site, (m, n) in model.spec.shapes.items()
        }
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids of unequal rows, padded on the right; places with loss; their targets."""
    longest = max(LENGTHS)
    ids = torch.randint(
        4, VOCABULARY, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(0)
    )
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ids = ids * mask
    places = [row * longest + t for row, length in enumerate(LENGTHS) for t in range(length - 1)]
    return ids, torch.tensor(places), ids.flatten()[torch.tensor(places) + 1]


def slots(model: LoadedModel) -> list[Slot]:
    return [Slot(adapter_of(model, rank), dict.fromkeys(model.spec.shapes, 2.0)) for rank in (2, 3)]


PARTS = [Part(0, 1, LENGTHS[0]), Part(1, 2, LENGTHS[1])]
ROWS = (slice(0, 1), slice(1, 3))


def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise Different where the largest difference is above the tolerance."""
    scale = max(float(theirs.abs().max()), 1e-12)
    apart = float((ours - theirs).abs().max()) / scale
    if not apart <= TOLERANCE:
        raise Different(f"{what}: {apart:.1e} of the largest number apart")


Factors = list[dict[str, Tensor]]
"""Of each client, its products' factors by site, s folded into B."""


def stepped(cohort: Cohort) -> Factors:
    """Return both clients' factors after a step of plain descent."""
    found = []
    for k in range(2):
        with torch.no_grad():
            for parameter in cohort.parameters(k):
                parameter -= parameter.grad
        found.append(
            {f"{s} {x}": t for s, d in cohort.adapter(k).items() for x, t in d.tensors().items()}
        )
    return found


def compare_factors(what: str, ours: Factors, theirs: Factors) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if mine.keys() != other.keys():
            raise Different(f"{what}: other factors")
        for name in other:
            compare(f"{what} {name}", mine[name], other[name])


def whole(model: LoadedModel) -> tuple[Tensor, Factors, Tensor]:
    """Return the clients' loss, their new factors, and the logits at the places with loss."""
    ids, places, targets = batch()
    with Cohort(model, slots(model)) as cohort:
        cohort.route(PARTS)
        logits = logits_at(model, ids, places)
        loss = cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        return loss.detach(), stepped(cohort), logits.detach()


def try_cohort(model: LoadedModel) -> None:
    """Two clients in one pass against peft, one by one."""
    _, found, logits = whole(model)
    ids, places, targets = batch()
    longest = ids.shape[1]
    theirs: Factors = []
    for slot, rows in zip(slots(model), ROWS, strict=True):
        here = (places >= rows.start * longest) & (places < rows.stop * longest)
        with with_peft(model, slot) as adapted:
            out = adapted(input_ids=ids[rows], use_cache=False).logits
            own = out.flatten(0, 1)[places[here] - rows.start * longest]
            compare("logits", logits[here], own.detach())
            cross_entropy(own, targets[here], reduction="sum").backward()
            factors = {}
            for site in slot.start:
                layer = adapted.base_model.model.get_submodule(site)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                factors |= {
                    f"{site} a": (a - a.grad).detach(),
                    f"{site} b": 2 * (b - b.grad).detach(),
                }
            theirs.append(factors)
    compare_factors("a step of", found, theirs)


@contextmanager
def with_peft(model: LoadedModel, slot: Slot) -> Iterator[PeftModel]:
    """Adapt the model by peft with the slot's factors at scale 2, for a while."""
    rank = next(iter(slot.start.ranks.values()))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(slot.start))
    adapted = get_peft_model(model.module, config, autocast_adapter_dtype=False).eval()
    try:
        with torch.no_grad():
            for site, delta in slot.start.items():
                layer = adapted.base_model.model.get_submodule(site)
                layer.lora_A["default"].weight.copy_(delta.a)
                layer.lora_B["default"].weight.copy_(delta.b / 2)
        yield adapted
    finally:
        adapted.unload()


def try_cut(model: LoadedModel) -> None:
    """Every cut against the whole model."""
    loss, found, _ = whole(model)
    ids, places, targets = batch()
    for lower in range(1, BLOCKS):
        cut = Cut(model, lower)
        with Cohort(model, slots(model)) as cohort:
            cohort.route(PARTS)
            sent = cut.head(ids)
            received = sent.detach().requires_grad_()
            mine = cross_entropy(cut.tail(received, places), targets, reduction="sum")
            mine.backward()
            sent.backward(received.grad)
            compare(f"loss at cut {lower}", mine.detach(), loss)
            compare_factors(f"cut {lower}:", stepped(cohort), found)


def try_plan(model: LoadedModel) -> None:
    """Memory of a client, whole and cut, from the configuration."""
    cost = CostModel(anatomy_of(model.module.config), model.spec, Workload(2, 16, 8))
    ranks = dict.fromkeys(model.spec.shapes, 2)
    uncut = cost.memory(ranks, None).total
    for lower in range(1, BLOCKS):
        part = cost.memory(ranks, CutPoint(lower)).total
        if not 0 < part < uncut:
            raise Different(f"cut {lower}: {part} bytes at the client, {uncut} for the whole model")


def try_export(model: LoadedModel) -> None:
    """A folder written, and read by peft and by polyrank."""
    adapter = adapter_of(model, 2)
    ids = batch()[0]
    with Cohort(model, [Slot(adapter, dict.fromkeys(adapter, 1.0))]):
        expected = model.module(ids, use_cache=False).logits.detach()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(f"{folder}/adapter", adapter, model)
        back = load_adapter(f"{folder}/adapter", model)
        wrapped = PeftModel.from_pretrained(
            model.module, f"{folder}/adapter", autocast_adapter_dtype=False
        ).eval()
        try:
            read = wrapped(input_ids=ids, use_cache=False).logits.detach()
        finally:
            wrapped.unload()
    compare("peft's reading", read, expected)
    for site, delta in back.items():
        compare(f"reading of {site}", delta.dense(), adapter[site].dense())
    if set(back) != set(adapter):
        raise Different("reading: other sites")


def table(title: str, rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return a Markdown table, and below it the reasons, each once with its architectures."""
    if not rows:
        return ""
    tries = list(next(iter(rows.values())))
    lines = [f"### {title}", "", f"| | {' | '.join(tries)} |", f"|---|{'---|' * len(tries)}"]
    lines += [f"| {n} | {' | '.join(row[t].word for t in tries)} |" for n, row in rows.items()]
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        if len(set(row.values())) == 1 and row[tries[0]].reason:
            reasons.setdefault(row[tries[0]].reason, []).append(name)
            continue
        for key, end in row.items():
            if end.reason:
                reasons.setdefault(end.reason, []).append(f"{name} {key}")
    if reasons:
        lines += ["", "Why:", ""]
        lines += [f"- {', '.join(names)}: {shortened(why)}" for why, names in reasons.items()]
    return "\n".join(lines)


def shortened(reason: str, longest: int = 200) -> str:
    return reason if len(reason) <= longest else f"{reason[:longest].rsplit(' ', 1)[0]} …"


def insert(page: Path, text: str) -> None:
    """Put the table between the marks of a page."""
    begin, end = "<!-- begin: benchmarks/architectures.py -->\n", "<!-- end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
