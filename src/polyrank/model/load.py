"""Loading a causal language model, from a hub id or a folder, ready to be adapted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from polyrank.errors import ModelError
from polyrank.model.checkpointing import checkpoint_blocks
from polyrank.model.describe import describe
from polyrank.model.settings import DTYPE_NAMES
from polyrank.model.sites import ALL_LINEAR, find_blocks
from polyrank.model.span import Span, sites_within
from polyrank.planning.spec import ModelSpec

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""The number formats of a base; adapters are float32, or float64 on a float64 base."""

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    TypeError,
    ArithmeticError,
    SafetensorError,
)
"""What reading or making a model raises where its files are not as they should be."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A frozen base: in evaluation mode, without gradients, and never written to.

    `spec` holds its sizes and chosen sites, `source` the hub id or folder that it came from.
    `checkpointing` says whether its blocks compute their activations again in the backward pass.
    The tokenizer always has an end-of-sequence and a padding token. `hosted` are the blocks whose
    weights are held here, usually all; `spec.sites` lie in these.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    source: str
    checkpointing: bool
    hosted: frozenset[int]


def load_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    sites: Sequence[str] | str = ALL_LINEAR,
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    checkpointing: bool = False,
    revision: str | None = None,
    spans: Sequence[Span] | None = None,
) -> LoadedModel:
    """Return a causal language model with its tokenizer, from a hub id or a folder.

    `device` is ``auto`` (cuda, else mps, else cpu) or a torch device; `dtype` is ``float32``,
    ``bfloat16`` or ``float64``. `sites`, `exclude` and `groups` are those of `choose_sites`.
    Weights are read from safetensors files only, and no code that comes with a model is run. With
    `spans` only the blocks in them are read, and their sites are chosen; the others' weights take
    no memory, and only a `Cut` can run the model.

    Raises ModelError if the model is missing, unreadable, incomplete or not a causal language
    model, or lacks a tokenizer or its end-of-sequence token; SiteError as `choose_sites`.
    """
    where = resolve_device(device)
    disable_progress_bar()
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    if where.type == "mps" and dtype == "float64":
        raise ModelError("model.dtype: mps has no float64; use float32, or device cpu")
    name, config = read_config(source, revision)

    tokenizer = read_tokenizer(name, revision)
    read = _read_whole if spans is None else _reader_of(spans)
    module, missing = fetch(
        "weights", name, read, revision=revision, config=config, dtype=DTYPES[dtype], device=where
    )
    if missing:
        raise ModelError(
            f"model {name}: the weights lack {len(missing)} tensors that "
            f"{type(module).__name__} needs ({', '.join(missing[:5])}, …); they would be random. "
            "Is this a complete causal language model?"
        )
    return wrap_model(
        module,
        tokenizer,
        sites=sites,
        exclude=exclude,
        groups=groups,
        checkpointing=checkpointing,
        source=name,
    )


def read_config(source: str | Path, revision: str | None = None) -> tuple[str, PretrainedConfig]:
    """Return the name and the configuration of a model, from a hub id or a folder.

    Raises ModelError if it is missing, unreadable, or not that of a causal language model.
    """
    name = str(Path(source).expanduser()) if _is_path(source) else str(source)
    if _is_path(source) and not Path(name).is_dir():
        raise ModelError(
            f"model: expected a folder with a model in it, {name} is not one; give a folder or a "
            "hub id, on the command line as model.source=NAME"
        )
    config = fetch(
        "configuration",
        name,
        AutoConfig.from_pretrained,
        revision=revision,
        trust_remote_code=False,
    )
    _refuse_other_kinds(name, config)
    return name, config


def read_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; ModelError if it cannot be had."""
    read = AutoTokenizer.from_pretrained
    return fetch("tokenizer", name, read, revision=revision, trust_remote_code=False)


_ONE_AT_A_TIME = threading.RLock()
"""transformers changes what is global while it reads, such as how weights are tied."""


def fetch(what: str, name: str, read: Callable[..., Any], **options: Any) -> Any:
    """Return what `read` gives of a model; ModelError, saying what was read, if it fails."""
    try:
        with _ONE_AT_A_TIME:
            return read(name, **options)
    except UNREADABLE as error:
        raise ModelError(_unreadable(what, name, error)) from error


def _reader_of(spans: Sequence[Span]) -> Callable[..., tuple[PreTrainedModel, list[str]]]:
    # Imported where it is used: it stands on inner parts of transformers' loader, which may change.
    from polyrank.model.part import read_part

    return partial(read_part, spans=spans)


def _read_whole(
    name: str,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return a model, and the names of tensors that its files lack."""
    module, info = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    return module.to(device), sorted(info["missing_keys"])


def wrap_model(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sites: Sequence[str] | str = ALL_LINEAR,
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    checkpointing: bool = False,
    source: str = "",
) -> LoadedModel:
    """Return a model that is in memory already, frozen and described.

    The module is put into evaluation mode and its parameters stop requiring gradients. Blocks on
    the meta device count as held elsewhere, and have no sites here; where all are, the model can
    be planned for and not run. A tokenizer
    without a padding token gets the end-of-sequence token for one. `checkpointing` wraps the blocks
    of this module for good.

    Raises ModelError if the tokenizer has no words, or no end-of-sequence token within the model's
    vocabulary; SiteError as `choose_sites`.
    """
    spec = describe(module, sites=sites, exclude=exclude, groups=groups)
    blocks = find_blocks(module).modules
    hosted = frozenset(i for i, block in enumerate(blocks) if not _is_absent(block))
    spec = sites_within(spec, hosted) if hosted else spec
    _complete_tokenizer(tokenizer, module, source or type(module).__name__)
    module.eval().requires_grad_(False)
    if checkpointing:
        checkpoint_blocks(blocks)
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        spec=spec,
        device=next((p.device for p in module.parameters() if not p.is_meta), module.device),
        dtype=module.dtype,
        source=source,
        checkpointing=checkpointing,
        hosted=hosted,
    )


def resolve_device(device: str) -> torch.device:
    """Return the torch device that a name stands for; ``auto`` is cuda, else mps, else cpu.

    Raises ModelError if there is no such device here.
    """
    usable: Mapping[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if device == "auto":
        return torch.device(next(name for name, is_there in usable.items() if is_there()))
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"model.device: expected auto, cpu, cuda or mps, got {device!r}"
        ) from error
    if torch_device.type not in usable or not usable[torch_device.type]():
        here = [name for name, is_there in usable.items() if is_there()]
        raise ModelError(f"model.device: {device!r} is not usable here; there is {here}")
    return torch_device


def _is_absent(block: nn.Module) -> bool:
    """Whether a block's weights are not held here."""
    return any(parameter.is_meta for parameter in block.parameters())


def _is_path(source: str | Path) -> bool:
    """Whether a source means a folder: it exists, or it cannot be a hub id (``owner/name``)."""
    if isinstance(source, Path) or Path(source).expanduser().is_dir():
        return True
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _refuse_other_kinds(name: str, config: Any) -> None:
    made_for = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if made_for and not known & set(made_for):
        raise ModelError(
            f"model {name}: expected a causal language model, its configuration says "
            f"{', '.join(made_for)}"
        )


def _unreadable(what: str, name: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    if _is_path(name):
        return f"model {name}: its {what} cannot be read ({said}); polyrank reads safetensors only"
    return (
        f"model {name}: its {what} cannot be had from the Hugging Face hub ({said}); check the id "
        "and the network (or HF_HUB_OFFLINE and the local cache), or give a folder that holds the "
        "model"
    )


def _complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel, name: str
) -> None:
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up, of nothing.
        raise ModelError(
            f"model {name}: expected a tokenizer, found none but special tokens; put the files of "
            "its tokenizer (tokenizer.json, tokenizer_config.json) beside the weights"
        )
    rows = module.get_input_embeddings().weight.shape[0]
    eos = tokenizer.eos_token_id
    if eos is None or eos >= rows:
        raise ModelError(
            f"model {name}: expected a tokenizer with an end-of-sequence token within the model's "
            f"vocabulary of {rows}, got {eos}; without one generation cannot know when to stop. "
            "Set eos_token in the folder's tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
