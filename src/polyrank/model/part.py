"""Loading some blocks of a model; the others take no memory.

The model is made on the meta device, and transformers' own loader is given the tensors of the
chosen blocks and no others, so that names are mapped and dtypes converted as for a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from polyrank.errors import ModelError
from polyrank.model.absent import as_zeros, outside
from polyrank.model.sites import Blocks, find_blocks
from polyrank.model.span import Span, blocks_of
from polyrank.model.stored import Stored, stored_tensors


def read_part(
    name: str,
    config: PretrainedConfig,
    spans: Sequence[Span],
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return a model that holds some blocks, and the names of tensors that its files lack.

    With the first block come the modules that are called before it, with the last one all others
    outside the blocks, and with a tied weight what it is tied to. All else stays on the meta
    device. Buffers that no file holds, such as rotary frequencies, are computed. Of a model on the
    hub only the files are fetched that hold one of these tensors.

    Raises ModelError as `blocks_of`, if the weights are quantised, or if the model cannot be run as
    far as its first block; OSError where the files cannot be had.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {name}: quantised weights cannot be read in part; load it whole")
    with torch.device("meta"):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    module.eval()
    blocks = find_blocks(module)
    chosen = blocks_of(spans, len(blocks.modules))
    _compute_buffers(module, device)
    hosted = _hosted(module, blocks, chosen, device)
    mapping = get_model_conversion_mapping(module)
    read = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=module._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=mapping,
    )
    tensors = _tensors(name, revision, _Names(module, mapping, hosted))
    info, _ = convert_and_load_state_dict_in_model(module, tensors, read)
    # What is not hosted is not missing: both ends of a tie on the meta device are left alone.
    info.missing_keys &= hosted
    module.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    module._adjust_missing_and_unexpected_keys(info)
    wrong = [key for key, *_ in info.mismatched_keys] + list(info.conversion_errors)
    return module, sorted({*info.missing_keys, *wrong})


def _compute_buffers(module: PreTrainedModel, device: torch.device) -> None:
    """Compute what no file holds; parameters are on the meta device, where this costs nothing."""
    for key, buffer in list(module.named_non_persistent_buffers()):
        owner, _, last = key.rpartition(".")
        module.get_submodule(owner)._buffers[last] = torch.empty_like(buffer, device=device)
    module.initialize_weights()


def _hosted(
    module: PreTrainedModel, blocks: Blocks, chosen: frozenset[int], device: torch.device
) -> set[str]:
    """Return the names of the tensors that the chosen blocks need."""
    beside = outside(module, blocks)
    before = _before(module, blocks, beside, device)
    last = len(blocks.modules) - 1

    def needed(key: str) -> bool:
        owner = key.rpartition(".")[0]
        if key.startswith(f"{blocks.prefix}."):
            return int(key[len(blocks.prefix) + 1 :].split(".", 1)[0]) in chosen
        if owner in before:
            return 0 in chosen
        return last in chosen or owner not in beside

    hosted = {key for key in module.state_dict() if needed(key)}
    ties = module.all_tied_weights_keys.items()
    hosted |= {source for target, source in ties if target in hosted}
    return hosted | {target for target, source in ties if source in hosted}


class _Begun(Exception):
    """Ends the run before the first block; never leaves this module."""


def _before(
    module: PreTrainedModel,
    blocks: Blocks,
    beside: Mapping[str, nn.Module],
    device: torch.device,
) -> set[str]:
    """Return which modules outside the blocks are called before the first, by a run so far."""
    called: set[str] = set()

    def stop(*_: Any) -> None:
        raise _Begun

    handle = blocks.modules[0].register_forward_pre_hook(stop)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with torch.no_grad(), as_zeros(beside, called.add):
            module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except _Begun:
        return called
    finally:
        handle.remove()
    raise ModelError(
        f"{type(module).__name__}: its forward method never came to {blocks.prefix}.0; load this "
        "model whole"
    )


class _Names:
    """Tells by a tensor's name in a file whether the part of the model needs it."""

    def __init__(self, module: PreTrainedModel, mapping: list[Any], hosted: set[str]):
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._state, self._prefix = module.state_dict(), module.base_model_prefix
        self._hosted = hosted

    def hold(self, key: str) -> bool:
        """Whether a tensor of this name is needed, by the rules of transformers' loader."""
        named, _ = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        if named not in self._state and key in self._state:
            named, _ = rename_source_key(key, [], [], self._prefix, self._state)
        return named in self._hosted


def _tensors(name: str, revision: str | None, names: _Names) -> dict[str, Stored]:
    """Return the needed tensors of a model's files, not yet read, by their names there."""
    return {
        key: tensor
        for path in _files(name, revision, names)
        for key, tensor in stored_tensors(path).items()
        if names.hold(key)
    }


def _files(name: str, revision: str | None, names: _Names) -> list[Path]:
    """Return the files that hold needed tensors: those that an index names, or the only one."""

    def locate(file: str, **options: Any) -> Path | None:
        cached = cached_file(name, file, revision=revision, **options)
        return None if cached is None else Path(cached)

    single = locate(SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = locate(SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise OSError(f"neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} is there")
    placed: Mapping[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    shards = sorted({shard for key, shard in placed.items() if names.hold(key)})
    return [path for shard in shards if (path := locate(shard)) is not None]
