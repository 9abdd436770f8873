"""What is inside a run folder, finished or not: its recipe, its rounds and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank import config
from polyrank.aggregation import Rule, SLoRA, rule
from polyrank.algebra import Adapter
from polyrank.config import Recipe
from polyrank.errors import RunError
from polyrank.planning import CutPoint
from polyrank.run import GlobalAdapter, RoundRecord, RunFolder, storage
from polyrank.run.folder import RUN

RECIPE = "recipe.toml"
FLEET = "fleet.json"


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run folder; RunError if there is none."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder")
    if (folder / RUN).is_file() and not (folder / RECIPE).is_file():
        raise RunError(
            f"{folder}: this run was made from Python, so it has no {RECIPE}; make the same "
            f"Federation again and go on there: federation.resume({str(folder)!r}), then rounds, "
            "or adapter.save"
        )
    if not (folder / RECIPE).is_file():
        raise RunError(
            f"{folder}: expected a folder that `polyrank run` made, with a {RECIPE} in it"
        )
    return config.read(folder / RECIPE)


@dataclass(frozen=True)
class RunInspection:
    """What `polyrank inspect` shows of a run folder, whether or not the run is finished."""

    records: list[RoundRecord]
    fleet: Mapping[str, Any] | None
    factors: Adapter | None
    result_round: int
    notes: list[str]


def cuts_of(fleet: Mapping[str, Any]) -> tuple[dict[str, CutPoint], int]:
    """Return the cut per type and the model's blocks, as fleet.json says; none in older ones."""
    cuts = fleet.get("cuts", {})
    return {name: CutPoint.of(written) for name, written in cuts.items()}, fleet.get("blocks", 0)


def look(folder: Path) -> RunInspection:
    """Read a run folder, without loading its model."""
    opened = RunFolder.peek(folder)
    saved = opened.load_checkpoint()
    rule = _rule_of(folder)
    if isinstance(rule, str):
        opened.notes.append(
            f"the adapter is not shown: its rule {rule} is code outside polyrank; make the same "
            "Federation in Python, then federation.resume(...).adapter"
        )
    factors = None
    if saved.round and not isinstance(rule, str):
        factors = rule.adapter(saved.best or saved.state)
    return RunInspection(
        records=[RoundRecord.from_json(r) for r in opened.records() if r["round"] <= saved.round],
        fleet=storage.read_json(folder / FLEET) if (folder / FLEET).exists() else None,
        factors=factors,
        result_round=saved.progress.best_round if saved.best else saved.round,
        notes=opened.notes,
    )


def adapter_of(folder: Path) -> GlobalAdapter:
    """Return the adapter of a run as its last whole checkpoint has it, finished or not."""
    recipe = recipe_of(folder)
    saved = RunFolder.peek(folder).load_checkpoint()
    if not saved.round:
        raise RunError(
            f"{folder}: no round is finished yet, so there is no adapter; polyrank resume {folder}"
        )
    factors = recipe.rule().adapter(saved.best or saved.state)
    ranks = _server_ranks(folder, factors, recipe.aggregation.server_rank)
    return GlobalAdapter(factors, recipe.model.load(), recipe.lora.build(), ranks)


def _server_ranks(folder: Path, factors: Adapter, wanted: int | None) -> dict[str, int]:
    """The rank at which the server keeps each site: `wanted`, or the fleet's largest there."""
    if wanted is not None:
        return {site: min(wanted, *delta.shape) for site, delta in factors.items()}
    by_type = storage.read_json(folder / FLEET)["ranks"].values()
    return {site: max(ranks.get(site, 0) for ranks in by_type) for site in factors}


def _rule_of(folder: Path) -> Rule | str:
    """The rule of a run, by its recipe, or by its name where the run was made from Python.

    Of a rule that is not polyrank's own it is the place of its class, which is not imported here.
    """
    if (folder / RECIPE).is_file():
        return recipe_of(folder).rule()
    begun = storage.read_json(folder / RUN)
    if "rule_class" in begun:
        return begun["rule_class"]
    settings = begun["settings"]
    name, begins_sparsely, _ = settings["rule"].partition("+")
    return SLoRA(rule(name), settings["options"]["rounds"]) if begins_sparsely else rule(name)
