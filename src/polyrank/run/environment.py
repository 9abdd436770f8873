"""The environment of a run that its bytes depend on: versions, threads, engine, model and data."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.aggregation import Rule
from polyrank.errors import InexactResumeError, RunError
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from polyrank.model import LoadedModel

SCHEMA = 1
"""Version of run.json's layout."""

PACKAGES = ("polyrank", "torch", "transformers", "tokenizers", "numpy")
"""Distributions whose version can change a run's numbers."""


def describe(
    model: LoadedModel, data: str, settings: Mapping[str, Any], rule: Rule
) -> dict[str, Any]:
    """Return the environment as JSON; `data` is the data's fingerprint.

    ``rule_class`` says where a rule that is not polyrank's own is defined, as module:class.
    """
    kind = type(rule)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "device": _device(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": {"source": model.source, "fingerprint": fingerprint(model)},
        "data": data,
        "settings": dict(settings),
    }
    if not kind.__module__.startswith("polyrank."):
        content["rule_class"] = f"{kind.__module__}:{kind.__qualname__}"
    return json.loads(json.dumps(content))  # As it is read again: tuples are lists.


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fingerprint(model: LoadedModel) -> str:
    """Return a SHA-256 (hex) over the configuration and every parameter's name, shape and bits.

    Of the bits only their sum and a sample are taken: cheap, exact in any order, and not
    cryptographic. It tells another checkpoint or a changed file, not a forgery. Of a model without
    weights it is that of the configuration alone.
    """
    if model.device.type == "meta":
        return config_fingerprint(model)
    digest = hashlib.sha256(_config(model))
    for name, parameter in model.module.named_parameters():
        flat = parameter.detach().reshape(-1).cpu()
        bits = flat.view(getattr(torch, f"int{8 * flat.element_size()}"))
        head = f"{name}|{tuple(parameter.shape)}|{parameter.dtype}|{bits.sum(dtype=torch.int64)}"
        digest.update(head.encode())
        digest.update(bits[:: max(1, bits.numel() // 64)].contiguous().numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(model: LoadedModel) -> str:
    """Return a SHA-256 (hex) over the configuration alone, which a model without weights has too.

    The adapted matrices and their shapes are in it.
    """
    sites = {site.name: site.shape for site in model.spec.sites}
    digest = hashlib.sha256(_config(model))
    digest.update(json.dumps(sites, sort_keys=True).encode())
    return digest.hexdigest()


def _config(model: LoadedModel) -> bytes:
    config = model.module.config.to_dict()
    relevant = {key: config[key] for key in config.keys() - _NOT_OF_THE_MODEL}
    return json.dumps(relevant, sort_keys=True, default=str).encode()


_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}


def check_schema(content: Any, path: Path) -> None:
    """Raise RunError unless what was read from run.json has the layout of this version."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise RunError(f"{path}: expected schema {SCHEMA}, got {schema}; another version wrote it")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return every difference as a line.

    Where the model or the rule's class lies may differ, the model's fingerprint not.
    """
    old, new = flat(before), flat(now)
    return [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(_FREE) and old.get(key) != new.get(key)
    ]


_FREE = ("model.source", "rule_class", "inexact")


def carried_over(
    before: Mapping[str, Any], now: Mapping[str, Any], *, round: int, allow_inexact: bool
) -> dict[str, Any]:
    """Return what a resumed run's environment is, given the one that it was begun in.

    Raises InexactResumeError, naming every difference, unless `allow_inexact`: then they are noted
    under ``inexact`` with the round after which they came.
    """
    differing = differences(before, now)
    if not differing:
        return dict(before)
    if not allow_inexact:
        listed = "\n  ".join(differing)
        raise InexactResumeError(
            "the run was begun in another environment, so its bytes could not be the same:\n  "
            f"{listed}\nrestore them, or resume with --allow-inexact"
        )
    note = {"after_round": round, "differences": differing}
    return {**now, "inexact": [*before.get("inexact", []), note]}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, its keys joined by dots."""
    flattened: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flattened |= flat(item, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = item
    return flattened
