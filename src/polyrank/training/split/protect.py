"""Protection of activations before a client sends them: a bound per token, and noise.

Neither is a guarantee: no differential privacy is claimed, and at levels at which a model still
learns, noise has been found to help little (docs/explanation/privacy.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bounded(states: Tensor, bound: float | None) -> Tensor:
    """Return P×d with tokens of a larger L2 norm scaled down to `bound`; None: as they are."""
    if bound is None:
        return states
    wide = torch.promote_types(states.dtype, torch.float32)
    norms = torch.linalg.vector_norm(states, dim=1, keepdim=True, dtype=wide)
    return states * (bound / norms.clamp_min(bound)).to(states.dtype)


def noised(states: Tensor, deviation: float, source: torch.Generator) -> Tensor:
    """Return P×d with Gaussian noise of this standard deviation added to every number."""
    noise = torch.empty(states.shape, dtype=torch.float32, device=source.device)
    noise.normal_(generator=source)
    return states + (noise * deviation).to(states)
