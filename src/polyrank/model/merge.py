"""Writing base and adapter as one ordinary model folder."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from polyrank.algebra import Adapter
from polyrank.errors import AdapterError, SiteError
from polyrank.model._folder import new_folder
from polyrank.model.load import LoadedModel
from polyrank.model.swap import as_stored


def save_merged(folder: str | Path, adapter: Adapter, model: LoadedModel) -> float:
    """Write W + ΔW as a Hugging Face model folder with its tokenizer; the loaded base stays as is.

    An update may be of any kind, and a dense one loses nothing. Sums are taken in float32 (float64
    on a float64 base) and rounded to the base's dtype. Returns what that rounding did to the
    update, ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ over all sites: about 1e-6 in float32; bfloat16 can
    lose most of a small update, and then a base loaded in float32 merges without that loss.

    Raises FolderExistsError if the folder holds something already, SiteError if the adapter does
    not fit the model, AdapterError if it is not finite or the folder cannot be written.
    """
    module, config = model.module, model.module.config
    state = module.state_dict()
    lost = total = 0.0
    for site, delta in adapter.items():
        if model.spec.shapes.get(site) != delta.shape:
            raise SiteError(
                f"{folder}: the adapter has an update of {delta.shape} at {site}, the model "
                f"{model.spec.shapes.get(site, 'no such site')}"
            )
        if not delta.is_finite():
            raise AdapterError(f"{folder}: the update at {site} holds NaN or infinity")
        name = f"{site}.weight"
        merged, error = _sum(state[name], as_stored(delta.dense(), module.get_submodule(site)))
        state[name] = merged
        lost += error**2
        total += delta.norm() ** 2
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


def _sum(weight: Tensor, update: Tensor) -> tuple[Tensor, float]:
    """Return W + ΔW in W's dtype and the norm of what rounding to it changed."""
    exact = weight.double() + update.to(weight.device).double()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = (weight.to(dtype) + update.to(device=weight.device, dtype=dtype)).to(weight.dtype)
    return merged, float(torch.linalg.matrix_norm(merged.double() - exact))
