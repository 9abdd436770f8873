"""Adapters as PEFT folders: written for `PeftModel.from_pretrained`, and read from anyone.

Inside polyrank ΔW = BA with every scale folded in; in a PEFT folder ΔW = s·B A with s from α and r.
The scale leaves B here on writing, and enters it here on reading, and nowhere else.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyrank.algebra import Adapter, LowRank
from polyrank.errors import AdapterError
from polyrank.model._folder import new_folder
from polyrank.model.load import LoadedModel
from polyrank.planning.scaling import Scaling

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PROPORTIONAL = Scaling()

_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "revision", "runtime_config"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "lora_dropout",  # acts in training only
    "fan_in_fan_out",  # says how the base stores its matrix; the factors are the same
    "init_lora_weights",  # checked apart
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how training began
    *("megatron_config", "megatron_core", "ensure_weight_tying"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin LoRA that leave the base as it was; others (PiSSA, OLoRA, …) change its weights."""


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    model: LoadedModel,
    *,
    scaling: Scaling = _PROPORTIONAL,
    base_name: str | None = None,
) -> None:
    """Write the adapter as a PEFT folder, for ``PeftModel.from_pretrained(base, folder)``.

    Per site α and r are those of `scaling`, and B is divided by their s, so that the update that
    PEFT computes is the adapter's. Sites of rank 0 are left out. Ranks that differ from site to
    site become rank and alpha patterns. `base_name` is what the folder says of its base; by default
    where the model was loaded from. The same adapter gives the same bytes.

    Raises FolderExistsError if the folder holds something already, AdapterError if the adapter is
    zero everywhere, not finite, or not of this model, or the disk refuses.
    """
    deltas = {site: delta for site, delta in adapter.items() if delta.rank}
    if not deltas:
        raise AdapterError(f"{folder}: every site of the adapter has rank 0: nothing to write")
    tensors = {}
    for site, delta in deltas.items():
        _check_site(f"{folder}", site, delta.shape, model)
        if not delta.is_finite():
            raise AdapterError(f"{folder}: the factors at {site} hold NaN or infinity")
        b = delta.b / scaling.scale(delta.rank)
        tensors[f"{_PREFIX}{site}.lora_A.weight"] = delta.a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{site}.lora_B.weight"] = b.detach().cpu().contiguous()
    base = base_name or model.source or None
    ranks = {site: delta.rank for site, delta in deltas.items()}
    config = _config(ranks, model, scaling, base)
    with new_folder(folder) as work:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (work / "README.md").write_text(_card(base, ranks))


def load_adapter(folder: str | Path, model: LoadedModel) -> Adapter:
    """Return the adapter of a PEFT LoRA folder, with the scale of every site folded into B.

    Ranks and alphas per site are matched to module names as peft matches them. Factors become
    float32 (float64 on a float64 base) on the model's device. Sites of the model that the folder
    does not adapt are absent from the result.

    Raises AdapterError if the folder is missing or unreadable, holds pickled weights only, lacks
    tensors or has unknown ones, does not fit the model and its sites, or needs what a low-rank
    update cannot express (DoRA, trained biases, modules to save, embeddings, a changed base, …).
    """
    place = Path(folder)
    config = _read_config(place)
    tensors = _read_tensors(place)
    modules = dict(model.module.named_modules())
    factors = _pair(place, tensors)
    foreign = [site for site in factors if site not in modules]
    if foreign:
        raise AdapterError(
            f"{place}: {WEIGHTS} has factors for {foreign[:3]}, not modules of this "
            f"{model.spec.architecture}; does the folder belong to another model?"
        )
    try:
        listed = config.target_modules not in (None, "all-linear")  # else nothing to compare with
        expected = _targeted(config, modules) if listed else set(factors)
        ranks_and_scales = {site: _rank_and_scale(config, site) for site in factors}
    except (re.error, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdapterError(
            f"{place}: a pattern or a number in {CONFIG} makes no sense: {error}"
        ) from error
    missing = sorted(expected - factors.keys())
    if missing:
        raise AdapterError(
            f"{place}: {CONFIG} targets {missing[:5]}, {WEIGHTS} has no factors for "
            f"{len(missing)} such modules"
        )
    unexpected = sorted(factors.keys() - expected)
    if unexpected:
        raise AdapterError(
            f"{place}: {WEIGHTS} has factors for {unexpected[:5]}, which are not among the target "
            f"modules of {CONFIG}; the two files do not belong together"
        )
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    deltas = {}
    for site, (a, b) in factors.items():
        rank, scale = ranks_and_scales[site]
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise AdapterError(
                f"{place}: at {site} expected factors of rank {rank} as {CONFIG} says, got A "
                f"{tuple(a.shape)} and B {tuple(b.shape)}"
            )
        delta = LowRank(b.to(dtype) * scale, a.to(dtype)).to(device=model.device)
        _check_site(f"{place}", site, delta.shape, model)
        if not delta.is_finite():
            raise AdapterError(f"{place}: the factors at {site} hold NaN or infinity")
        deltas[site] = delta
    return Adapter(deltas)


def _config(
    ranks: Mapping[str, int], model: LoadedModel, scaling: Scaling, base: str | None
) -> dict[str, Any]:
    """Return adapter_config.json; the most common rank and α are the defaults of the patterns."""
    alphas = {site: _number(float(scaling.lora_alpha(rank))) for site, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = _number(float(scaling.lora_alpha(rank)))
    modules = model.module.get_submodule
    config = LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={site: own for site, own in ranks.items() if own != rank},
        alpha_pattern={site: own for site, own in alphas.items() if own != alpha},
        use_rslora=scaling.rank_stabilised,
        fan_in_fan_out=all(isinstance(modules(site), Conv1D) for site in ranks),
        target_modules=_target_names(ranks, model.module),
    ).to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _target_names(sites: Iterable[str], module: nn.Module) -> list[str]:
    """Return last names (``q_proj``) where they mean sites only, else full paths."""
    chosen = set(sites)
    namesakes: dict[str, set[str]] = {}
    for path, _ in module.named_modules():
        namesakes.setdefault(path.rsplit(".", 1)[-1], set()).add(path)
    return sorted(
        {
            last if namesakes[last] <= chosen else site
            for site in chosen
            for last in [site.rsplit(".", 1)[-1]]
        }
    )


def _card(base: str | None, ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    told = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return (
        "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- polyrank\n---\n\n"
        f"# LoRA adapter\n\nAn adapter of {told} at {len(ranks)} matrices of "
        f"`{base or 'its base model'}`, trained with polyrank.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base or "BASE"}")\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n'
    )


def _check_site(place: str, site: str, shape: tuple[int, int], model: LoadedModel) -> None:
    shapes = model.spec.shapes
    if site not in shapes:
        raise AdapterError(
            f"{place}: {site} is not a site of this {model.spec.architecture}; its sites are "
            f"{list(shapes)[:3]}, … ({len(shapes)}). Load the model with sites that include it, if "
            "it is a linear layer of a decoder block; nothing else can be adapted"
        )
    if shape != shapes[site]:
        raise AdapterError(
            f"{place}: at {site} expected an update of {shapes[site]} (out × in), got {shape}; is "
            "the adapter of a model of another size?"
        )


def _read_config(place: Path) -> LoraConfig:
    path = place / CONFIG
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as a PEFT configuration: {error}") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else values
        raise AdapterError(f"{path}: expected peft_type LORA, got {kind!r}")
    plain = LoraConfig().to_dict()
    for key, value in values.items():
        if key not in _UNDERSTOOD and value and value != plain.get(key):
            raise AdapterError(
                f"{path}: {key} = {value!r} is not expressible as a low-rank update of the sites; "
                "polyrank reads plain LoRA (and rsLoRA) only"
            )
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights = {values['init_lora_weights']!r} changed the base's "
            "weights; save the adapter with peft's path_initial_model_for_weight_conversion first"
        )
    known = {key: v for key, v in values.items() if key in plain and key in _UNDERSTOOD}
    try:
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{path} is not a configuration that peft accepts: {error}") from error


def _read_tensors(place: Path) -> dict[str, Tensor]:
    path = place / WEIGHTS
    if not path.is_file() and (place / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{place}: the weights are pickled (adapter_model.bin), which polyrank never reads; "
            f"load and save the adapter with peft to get {WEIGHTS}"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def _pair(place: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, B) per module path; AdapterError for a tensor that is not half of such a pair."""
    endings = (".lora_A.weight", ".lora_B.weight")
    paths: dict[str, None] = {}
    for key in tensors:
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is None or not key.startswith(_PREFIX):
            raise AdapterError(
                f"{place}: {WEIGHTS} holds {key}, expected {_PREFIX}MODULE with one of "
                f"{', '.join(endings)}; polyrank reads LoRA at linear layers only"
            )
        paths[key[len(_PREFIX) : -len(ending)]] = None
    pairs = {}
    for path in paths:
        halves = [tensors.get(f"{_PREFIX}{path}{ending}") for ending in endings]
        if halves[0] is None or halves[1] is None:
            raise AdapterError(f"{place}: {WEIGHTS} holds only one of the two factors at {path}")
        pairs[path] = (halves[0], halves[1])
    return pairs


def _targeted(config: LoraConfig, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the modules that peft would adapt."""
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    candidates = [path for path, module in modules.items() if isinstance(module, kinds)]
    return {path for path in candidates if check_target_module_exists(config, path)}


def _rank_and_scale(config: LoraConfig, site: str) -> tuple[int, float]:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), site), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), site), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
