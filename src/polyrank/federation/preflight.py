"""Failures that can be foreseen: memory and disk, before training starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil
import torch

from polyrank.aggregation import FleetSpec
from polyrank.errors import RecipeError, ResourceError
from polyrank.federation.folder import KEEP
from polyrank.federation.work import ClientWork
from polyrank.model import LoadedModel
from polyrank.training import LocalTraining, cohort_size, slot_bytes

SHARE = 0.5
"""The share of the free memory that a cohort may take, by estimate."""


def resolve_cohort(
    wanted: int | Literal["auto"],
    model: LoadedModel,
    spec: FleetSpec,
    local: LocalTraining,
    work: Mapping[str, ClientWork],
) -> int:
    """Return how many clients train in one pass; ResourceError if not even one fits memory."""
    if wanted != "auto" and wanted < 1:
        raise RecipeError(f"engine.cohort: expected auto or at least 1, got {wanted}")
    rows = [row for client in work.values() for row in client.rows["train"]]
    longest = max(len(row.input_ids) for row in rows)
    targets = max(row.targets for row in rows)
    largest = max(spec.ranks.values(), key=lambda ranks: sum(ranks.values()))
    free = free_memory(model.device)
    if slot_bytes(model, largest, local, longest, targets) > free:
        raise ResourceError(
            f"memory: {free / 2**20:.0f} MiB are free on {model.device}, by estimate too little to "
            f"train one client with batches of {local.batch} × {longest} tokens; lower local.batch "
            "or data.max_length, or set model.checkpointing = true"
        )
    if wanted != "auto":
        return wanted
    fits = cohort_size(model, largest, local, longest, targets, int(free * SHARE))
    return max(1, min(fits, len(spec.ranks)))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_disk(folder: Path, spec: FleetSpec, clients: int) -> None:
    """Raise ResourceError if the checkpoints and the updates of one round will not fit the disk."""
    state = _bytes(spec, spec.server_rank)
    updates = clients * max(_bytes(spec, ranks) for ranks in spec.ranks.values())
    needed = (KEEP + 2) * 2 * state + updates  # A state and a best one each; one being written,
    free = shutil.disk_usage(folder).free  # and the adapter.
    if needed > free:
        raise ResourceError(
            f"{folder}: a round needs up to {needed / 2**20:.0f} MiB on disk, {free / 2**20:.0f} "
            "MiB are free; choose another --out, fewer clients a round or smaller ranks"
        )


def _bytes(spec: FleetSpec, ranks: Mapping[str, int]) -> int:
    """Bytes of float32 factors of these ranks."""
    return sum(4 * rank * sum(spec.shapes[site]) for site, rank in ranks.items())
