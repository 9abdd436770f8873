"""What a run's bytes depend on beside its settings: versions, threads, engine, model and data."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from polyrank.errors import InexactResumeError
from polyrank.model import LoadedModel

PACKAGES = ("polyrank", "torch", "transformers", "tokenizers", "numpy")
"""Distributions whose version can change a run's numbers."""


def describe(model: LoadedModel, data: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the surroundings as JSON; `data` is the data's fingerprint."""
    return {
        "schema": 1,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": {"source": model.source, "fingerprint": fingerprint(model)},
        "data": data,
        "settings": dict(settings),
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fingerprint(model: LoadedModel) -> str:
    """Return a SHA-256 (hex) over every parameter's name, shape, dtype, sum and a sample of it.

    Cheap, not cryptographic: it tells another checkpoint or a changed file, not a forgery.
    """
    digest = hashlib.sha256()
    for name, parameter in model.module.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes()
        total = flat.sum(dtype=torch.float64 if flat.device.type != "mps" else torch.float32)
        digest.update(
            f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|{total.item()!r}".encode()
        )
        digest.update(sample)
    return digest.hexdigest()


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], *, allow_inexact: bool) -> None:
    """Raise InexactResumeError, naming every difference, unless `allow_inexact`.

    Where the model lies may differ, its fingerprint may not.
    """
    old, new = _flat(before), _flat(now)
    differ = [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key != "model.source" and old.get(key) != new.get(key)
    ]
    if differ and not allow_inexact:
        raise InexactResumeError(
            "the run was begun in other surroundings, so that its bytes could not be the same:\n  "
            + "\n  ".join(differ)
            + "\nrestore them, or resume with --allow-inexact"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
