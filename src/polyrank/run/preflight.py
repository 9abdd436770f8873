"""Failures that can be foreseen: memory and disk, before training starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from polyrank.aggregation import Assignment, FleetSpec, Rule, State
from polyrank.data import sizes
from polyrank.errors import DataError, RankError, RecipeError, ResourceError, RuleError
from polyrank.evaluation.benchmark import Benchmark
from polyrank.model import Cut, LoadedModel
from polyrank.model.span import sites_within
from polyrank.planning import Fleet
from polyrank.run import storage
from polyrank.run.checkpoint import KEEP
from polyrank.run.settings import RunSettings
from polyrank.training import LocalTraining, cohort_size, slot_bytes
from polyrank.training.client_data import ClientWork
from polyrank.training.split import SplitSettings

SHARE = 0.5
"""The share of the free memory that a cohort may take, by estimate."""


def resolve_cohort(
    wanted: int | Literal["auto"],
    model: LoadedModel,
    spec: FleetSpec,
    local: LocalTraining,
    work: Mapping[str, ClientWork],
    heaviest: Sequence[Assignment] = (),
    *,
    scored: bool = False,
) -> int:
    """Return how many clients train in one pass; ResourceError if not even one fits memory.

    `heaviest` are assignments as heavy as they will come, for their parts beside factors. With
    `scored` some steps measure importance.
    """
    longest = targets = 0
    for client in work.values():
        for size in sizes(client.rows["train"]):
            longest, targets = max(longest, size.tokens), max(targets, size.targets)
    most = max(spec.ranks.values(), key=lambda ranks: sum(ranks.values()))
    largest = {**dict.fromkeys(model.spec.shapes, 0), **most}
    free = free_memory(model.device)
    if slot_bytes(model, largest, local, longest, targets, heaviest, scored=scored) > free:
        raise ResourceError(
            f"memory: {free / 2**20:.0f} MiB are free on {model.device}, by estimate too little to "
            f"train one client with batches of {local.batch} × {longest} tokens; lower local.batch "
            "or data.max_length, or set model.checkpointing = true"
        )
    if wanted != "auto":
        return wanted
    fits = cohort_size(
        model, largest, local, longest, targets, int(free * SHARE), heaviest, scored=scored
    )
    return max(1, min(fits, len(spec.ranks)))


def check_measures(
    settings: RunSettings,
    model: LoadedModel,
    work: Mapping[str, ClientWork],
    benchmark: Benchmark | None = None,
) -> None:
    """Raise RecipeError or DataError if something is asked for that could never be measured."""
    measured, context = settings.evaluation, model.spec.context
    if (measured.generate or measured.generate_every) and measured.max_new_tokens >= context:
        raise RecipeError(
            f"evaluation.max_new_tokens: {measured.max_new_tokens} leave no room for a prompt in "
            f"the context of {model.source}, {context} tokens; lower it"
        )
    if settings.target_perplexity is not None and (
        benchmark is None or not benchmark.between or not benchmark.settings.every
    ):
        raise RecipeError(
            "target_perplexity: needs the perplexity between the rounds; give benchmark.validation "
            "and benchmark.every"
        )
    wishes = {"early_stopping": settings.stopping, "target_loss": settings.target_loss}
    for name in (name for name, wish in wishes.items() if wish is not None):
        if not measured.every:
            raise RecipeError(f"{name}: needs the validation loss; set evaluation.every")
        if not any(client.seen and client.rows["validation"] for client in work.values()):
            raise DataError(
                f"{name}: no client that trains has a validation example; raise the share of "
                "validation in data.fractions, or leave it out"
            )


def check_cuts(model: LoadedModel, fleet: Fleet, rule: Rule, split: SplitSettings) -> None:
    """Raise what split training would raise in its first round, if clients are cut as `fleet` says.

    ModelError for a cut outside the model, or an architecture that cannot be cut, SiteError for a
    side without sites or a weight that is tied across the cut; with one adapter that split clients
    share, RuleError for a rule that cannot have it, and RankError where their ranks differ.
    """
    fleet.check_cuts(model.spec)
    cuts = {name: cut for name, cut in fleet.cuts.items() if name in fleet.possible}
    for cut in set(cuts.values()):
        Cut(model, cut.lower, cut.upper)
        for blocks in (cut.at_client(model.spec.blocks), cut.at_server(model.spec.blocks)):
            sites_within(model.spec, blocks)
    if not cuts or split.adapters != "shared":
        return
    if "shared" in rule.excludes:
        raise RuleError(
            f"split.adapters = 'shared' and the rule {rule.name!r} exclude each other: "
            f"{rule.excludes['shared']}; set split.adapters = 'own', or take another rule"
        )
    ranks, at = (
        fleet.ranks_by_type(model.spec),
        {site.name: site.block for site in model.spec.sites},
    )
    first: dict[str, tuple[str, int]] = {}
    for name, cut in sorted(cuts.items()):
        server = cut.at_server(model.spec.blocks)
        for site in (site for site in at if at[site] in server):
            rank = ranks[name].get(site, 0)
            other, before = first.setdefault(site, (name, rank))
            if rank != before:
                raise RankError(
                    f"split.adapters = 'shared': at {site} type {other} has rank {before}, "
                    f"type {name} rank {rank}; one adapter has one rank. Give both the same ranks "
                    "behind the cut, or set split.adapters = 'own'"
                )


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_disk(
    folder: Path, state: State, assignments: Sequence[Assignment], clients: int, growth: int = 0
) -> None:
    """Raise ResourceError if the checkpoints and the updates of one round will not fit the disk.

    `growth` says by how many bytes the state may come to grow.
    """
    updates = clients * max(
        _bytes(delta.tensors() for delta in assignment.start.values()) for assignment in assignments
    )
    # A state and a best one in each checkpoint, one more being written, and the adapter.
    needed = (KEEP + 2) * 2 * (_bytes([state.tensors]) + growth) + updates
    free = shutil.disk_usage(storage.existing(folder)).free
    if needed > free:
        raise ResourceError(
            f"{folder}: a round needs up to {needed / 2**20:.0f} MiB on disk, {free / 2**20:.0f} "
            "MiB are free; choose another --out, fewer clients a round or smaller ranks"
        )


def _bytes(tensors: Iterable[Mapping[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for named in tensors for tensor in named.values())
