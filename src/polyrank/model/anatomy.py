"""A model's anatomy for planning, read off a copy without weights.

    module = meta_model("folder-with-only-a-config.json", "bfloat16")
    anatomy = anatomy_of(module)

The model is made on the meta device, where tensors have shapes and no numbers, and runs a few short
rows. Autograd's graph of one block of each kind then says what is kept for the backward pass and
which matrices are multiplied; see `polyrank.planning.anatomy`. Attention by
`scaled_dot_product_attention` is recorded as the fused kernel that runs it on CPUs and GPUs: q, k,
v, the output and one float32 per query and head are kept. Eager attention is recorded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from polyrank.errors import ModelError
from polyrank.model.absent import outside
from polyrank.model.load import (
    DTYPES,
    UNREADABLE,
    LoadedModel,
    read_config,
    read_tokenizer,
    wrap_model,
)
from polyrank.model.recording import Recorded, record
from polyrank.model.sites import ALL_LINEAR, Blocks, find_blocks
from polyrank.planning.anatomy import Anatomy, Block, Kind, Node, Saved, Section, Size, Storage

_ROWS = 2
"""A single row would not do: some copies are spared there."""

_TARGETS = 2
_LENGTHS = (5, 8, 13)
"""Tokens per row of the recorded passes; three determine a polynomial of degree 2."""


def meta_model(
    source: str | Path | PretrainedConfig, dtype: str = "float32", *, revision: str | None = None
) -> PreTrainedModel:
    """Return a causal language model without weights, on the meta device.

    Of a folder or hub id only the configuration is read.
    Raises ModelError if it cannot be read or is not that of a causal language model.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if isinstance(source, PretrainedConfig):
        name, config = type(source).__name__, source
    else:
        name, config = read_config(source, revision)
    try:
        with torch.device("meta"):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=DTYPES[dtype]
            )
    except UNREADABLE as error:
        raise ModelError(
            f"model {name}: no causal language model can be made of its configuration "
            f"({' '.join(str(error).split())[:300]}); correct config.json, or choose another model"
        ) from error
    return module.eval().requires_grad_(False)


def load_bare(
    source: str | Path,
    *,
    dtype: str = "float32",
    sites: Sequence[str] | str = ALL_LINEAR,
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    checkpointing: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Return a model without weights, with its tokenizer: to plan for, not to run.

    Takes and raises what `load_model` does. Of a hub id configuration and tokenizer are fetched.
    """
    name, _ = read_config(source, revision)
    return replace(
        wrap_model(
            meta_model(source, dtype, revision=revision),
            read_tokenizer(name, revision),
            sites=sites,
            exclude=exclude,
            groups=groups,
            source=name,
        ),
        checkpointing=checkpointing,
    )


def anatomy_of(
    source: str | Path | PretrainedConfig | PreTrainedModel | LoadedModel,
    dtype: str | None = None,
    *,
    revision: str | None = None,
) -> Anatomy:
    """Return the anatomy of a model, in the number format in which its base is held.

    Weights are neither read nor made, so that a model of any size takes seconds. `dtype` is
    ``float32`` unless given, and a model's own if `source` is one.

    Raises ModelError as `meta_model`, and if the model cannot be run without weights, does not
    compute its logits by its output embedding, or hands itself more than hidden states.
    """
    if isinstance(source, LoadedModel):
        source = source.module
    if isinstance(source, PreTrainedModel):
        own_dtype = next(name for name, kind in DTYPES.items() if kind == source.dtype)
        module = meta_model(source.config, dtype or own_dtype)
    else:
        module = meta_model(source, dtype or "float32", revision=revision)
    return _anatomy(module)


def _anatomy(module: PreTrainedModel) -> Anatomy:
    _refuse_experts(module)
    blocks = find_blocks(module)
    kinds = _kinds(module, blocks)
    distinct = list(dict.fromkeys(kinds))
    chosen = [kinds.index(kind) for kind in distinct]
    window = _window(module)
    short, first = _sections(module, blocks, chosen, _lengths_below(window))
    long = short
    if window is not None:
        long, first = _sections(
            module, blocks, chosen, [window + length for length in (0, *_LENGTHS[:2])]
        )
        short = short or long
    made = [Kind(a, b, window) for a, b in zip(short, long, strict=True)]
    embedding = module.get_output_embeddings().weight
    own = {
        f"{blocks.prefix}.{i}": {id(p): p.numel() for p in block.parameters()}
        for i, block in enumerate(blocks.modules)
    }
    ends = _ends(module, blocks, first)
    return Anatomy(
        architecture=type(module).__name__,
        hidden=module.config.get_text_config().hidden_size,
        vocabulary=embedding.shape[0],
        itemsize=module.dtype.itemsize,
        attention="eager" if module.config._attn_implementation == "eager" else "fused",
        blocks=tuple(
            Block(prefix, sum(own[prefix].values()), distinct.index(kind))
            for prefix, kind in zip(own, kinds, strict=True)
        ),
        kinds=tuple(made[:-1]),
        end=made[-1],
        first=sum(ends[0].values()),
        last=sum(ends[1].values()),
        tied=sum(count for key, count in ends[0].items() if key in ends[1]),
    )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _refuse_experts(module: PreTrainedModel) -> None:
    """Raise ModelError for a mixture of experts."""
    config = module.config.get_text_config()
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        raise ModelError(
            f"{type(module).__name__}: a mixture of experts; what it computes depends on the "
            "tokens, so its costs cannot be foreseen. Give every client its ranks yourself"
        )


def _kinds(module: PreTrainedModel, blocks: Blocks) -> list[object]:
    """Return per block what tells kinds apart: class, shapes, and kind of attention."""
    layers = getattr(module.config.get_text_config(), "layer_types", None)
    return [
        (
            type(block),
            tuple((name, tuple(p.shape)) for name, p in block.named_parameters()),
            layers[i] if layers else None,
        )
        for i, block in enumerate(blocks.modules)
    ]


def _window(module: PreTrainedModel) -> int | None:
    """Return the sliding window, where rows of that length are masked otherwise than short ones."""
    config = module.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int) or (context is not None and window > context):
        return None
    return window


def _lengths_below(window: int | None) -> list[int]:
    """Return three lengths below the window; none if it has no room for them."""
    if window is None or window > _LENGTHS[-1]:
        return list(_LENGTHS)
    return [window - 3, window - 2, window - 1] if window > 4 else []


def _ends(
    module: PreTrainedModel, blocks: Blocks, before: frozenset[str]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the parameters that go with the first block and with the last, by identity."""
    beside = outside(module, blocks)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        owner = key.rpartition(".")[0]
        if key.startswith(f"{blocks.prefix}."):
            continue
        if owner in before or owner not in beside:
            first[id(parameter)] = parameter.numel()
        if owner not in before:
            last[id(parameter)] = parameter.numel()
    return first, last


def _sections(
    module: PreTrainedModel, blocks: Blocks, chosen: list[int], lengths: list[int]
) -> tuple[list[Section], frozenset[str]]:
    """Return the sections of the chosen blocks and of the end, and what runs before the blocks."""
    if not lengths:
        return [], frozenset()
    shapes = [(_ROWS, length, _TARGETS) for length in lengths]
    shapes += [(_ROWS + 1, lengths[0], _TARGETS), (_ROWS, lengths[0], _TARGETS + 1)]
    runs = [record(module, blocks, chosen, *shape) for shape in shapes]
    sections = []
    for part in range(len(chosen) + 1):
        recorded = [run.sections[part] for run in runs]
        if len({section.form for section in recorded}) != 1:
            raise ModelError(
                f"{type(module).__name__}: its computation depends on the batch in more than size; "
                "its costs cannot be foreseen. Give every client its ranks yourself"
            )
        sections.append(_section(recorded, lengths))
    return sections, runs[0].before


def _section(recorded: list[Recorded], lengths: list[int]) -> Section:
    like = recorded[0]
    sizes = [
        _fit([section.storages[i].nbytes for section in recorded], lengths)
        for i in range(len(like.storages))
    ]
    nodes = []
    for i, node in enumerate(like.nodes):
        products = [section.nodes[i].product for section in recorded]
        nodes.append(
            Node(
                inputs=node.inputs,
                saved=tuple(Saved(storage, needs) for storage, needs in node.saved),
                product=_fit(products, lengths) if any(products) else None,
                backward=node.backward,
                attention=node.attention,
                site=node.site,
                nbytes=_fit([section.nodes[i].nbytes for section in recorded], lengths),
                passes=node.passes,
            )
        )
    storages = tuple(
        Storage(size, storage.shared) for size, storage in zip(sizes, like.storages, strict=True)
    )
    return Section(tuple(nodes), storages, dict(like.inputs), like.entry)


def _fit(values: list[int], lengths: list[int]) -> Size:
    """Return the polynomial through values at three lengths, with a row and with a target more."""
    (x, y, z), (a, b, c) = lengths, values[:3]
    by_row = values[3] * _ROWS == a * (_ROWS + 1) and a > 0
    by_target = values[4] - a
    if not (by_row or values[3] == a) or (by_row and by_target):
        raise ModelError(
            f"a tensor of {a} bytes for {_ROWS} rows takes {values[3]} for one more; the model's "
            "costs cannot be foreseen. Give every client its ranks yourself"
        )
    first, second = (b - a) / (y - x), (c - b) / (z - y)
    square = (second - first) / (z - x)
    linear = first - square * (x + y)
    constant = a - linear * x - square * x * x - by_target * _TARGETS
    rows = _ROWS if by_row else 1
    return Size(constant / rows, linear / rows, square / rows, by_target, by_row)
