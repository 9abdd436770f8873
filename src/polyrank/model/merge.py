"""Writing base and adapter as one ordinary model folder."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from polyrank.algebra import Adapter
from polyrank.errors import AdapterError, SiteError
from polyrank.model._folder import new_folder
from polyrank.model.load import LoadedModel


def save_merged(folder: str | Path, adapter: Adapter, model: LoadedModel) -> float:
    """Write W + ΔW as a Hugging Face model folder with its tokenizer; the loaded base stays as is.

    Sums are taken in float32 (float64 on a float64 base) and rounded to the base's dtype. Returns
    what that rounding did to the update, ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ over all sites: about
    1e-6 in float32; bfloat16 can lose most of a small update, and then a base loaded in float32
    merges without that loss.

    Raises FolderExistsError if the folder holds something already, SiteError if the adapter does
    not fit the model, AdapterError if it is not finite or the folder cannot be written.
    """
    state = model.module.state_dict()
    lost = total = 0.0
    for site, delta in adapter.items():
        if model.spec.shapes.get(site) != delta.shape:
            raise SiteError(
                f"{folder}: the adapter has an update of {delta.shape} at {site}, the model "
                f"{model.spec.shapes.get(site, 'no such site')}"
            )
        if not delta.is_finite():
            raise AdapterError(f"{folder}: the factors at {site} hold NaN or infinity")
        name = f"{site}.weight"
        merged, error = _sum(state[name], _as_stored(delta.dense(), model, site))
        state[name] = merged
        lost += error**2
        total += delta.norm() ** 2
    module, config = model.module, model.module.config
    with new_folder(folder) as work:
        try:
            # Writing notes dtype and architecture in the configuration: let it note them in a copy.
            module.config = copy.deepcopy(config)
            module.save_pretrained(work, state_dict=state)
            model.tokenizer.save_pretrained(work)
        except ValueError as error:
            raise AdapterError(f"{folder}: transformers cannot write it: {error}") from error
        finally:
            module.config = config
    return math.sqrt(lost / total) if total else 0.0


def _as_stored(dense: Tensor, model: LoadedModel, site: str) -> Tensor:
    """Return m×n as the site's module stores it: n×m in a Conv1D."""
    return dense.T if isinstance(model.module.get_submodule(site), Conv1D) else dense


def _sum(weight: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """Return W + ΔW in W's dtype and the norm of what rounding to it changed."""
    exact = weight.double() + update.to(weight.device).double()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = (weight.to(dtype) + update.to(device=weight.device, dtype=dtype)).to(weight.dtype)
    return merged, float(torch.linalg.matrix_norm(merged.double() - exact))
