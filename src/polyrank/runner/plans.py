"""Plans from a recipe: for a run, and explained to people before one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyrank.config.recipe import SERVER
from polyrank.errors import RecipeError
from polyrank.planning import DeviceProfile, Fleet, Limits, ModelSpec, Plan, PlanSettings
from polyrank.run import Planning, planner_of
from polyrank.run.planning import Importance
from polyrank.settings import part

if TYPE_CHECKING:
    from polyrank.config import Recipe
    from polyrank.config.plan import PlanSection
    from polyrank.model import LoadedModel
    from polyrank.training import ClientWork


@dataclass(frozen=True)
class PlanPreview:
    """What a recipe's clients would do in their first round, by device, and who has which.

    `levels` are the ranks that plans choose from, `scored` says whether importance is measured.
    """

    plans: Mapping[str, Plan]
    devices: Mapping[str, str]
    spec: ModelSpec
    levels: tuple[int, ...]
    scored: bool

    @property
    def feasible(self) -> bool:
        """Whether every client can take part."""
        return all(self.plans[name].feasible for name in self.devices.values())

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object per client."""
        return [
            {"client": client, **_described(self.plans[name])}
            for client, name in sorted(self.devices.items())
        ]


def planning_of(
    recipe: Recipe,
    model: LoadedModel,
    fleet: Fleet,
    work: Mapping[str, ClientWork],
    devices: Mapping[str, DeviceProfile] | None = None,
    limits: Mapping[str, Limits] | None = None,
) -> Planning:
    """Return how a recipe's run plans; RecipeError if it has no [plan].

    `devices` are those of the fleet that the recipe does not name, `limits` of any.
    """
    section = _section(recipe)
    profiles = recipe.profiles()
    planner = planner_of(
        model,
        work,
        recipe.local,
        recipe.run_settings(),
        part(PlanSettings, section),
        profiles[SERVER],
        scored=section.metric is not None and not recipe.data.pooled,
    )
    return Planning(
        planner=planner,
        devices={name: {**profiles, **(devices or {})}[name] for name in fleet.possible},
        fleet=fleet,
        rounds=recipe.rounds,
        metric=section.metric,
        every=section.every,
        threshold=section.threshold,
        force=recipe.fleet.force,
        allocation=section.allocation,
        limits={name: limit for name, limit in (limits or {}).items() if name in fleet.possible},
    )


def preview(recipe: Recipe) -> PlanPreview:
    """Return the first plans of a recipe; of its model only configuration and tokenizer are read.

    Raises RecipeError for a recipe without [plan], before anything is read.
    """
    _section(recipe)
    from polyrank.training import prepare

    clients = recipe.clients()
    model = recipe.model.load_bare()
    fleet = recipe.fleet_of(clients)
    work, _ = prepare(clients, model, recipe.data.encoding())
    planning = planning_of(recipe, model, fleet, work)
    return PlanPreview(
        planning.plans(Importance()),
        dict(fleet.at(1)),
        model.spec,
        planning.levels,
        planning.planner.cost.workload.scored,
    )


def _section(recipe: Recipe) -> PlanSection:
    if recipe.plan is None:
        raise RecipeError(
            "this recipe gives its clients LoRA types, so that there is nothing to plan; to plan, "
            "add a section [plan] and give clients devices for types, as in fleet.clients = "
            '{ clinic = "small" } with devices.small = { memory = "6 GiB" }'
        )
    return recipe.plan


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "device": plan.device.name,
        "ranks": dict(plan.ranks),
        "cut": None if plan.cut is None else plan.cut.written,
        "memory_bytes": plan.memory.total,
        "memory_budget_bytes": plan.device.memory_bytes,
        "memory": {
            "weights": plan.memory.weights,
            "adapters": plan.memory.adapters,
            "gradients": plan.memory.gradients,
            "optimizer": plan.memory.optimizer,
            "activations": plan.memory.activations,
            "temporary": plan.memory.temporary,
        },
        "operations_per_step": {"client": plan.operations.client, "server": plan.operations.server},
        "wire_bytes_per_step": {"up": plan.wire.up, "down": plan.wire.down},
        "adapter_bytes_per_round": {"up": plan.adapters.up, "down": plan.adapters.down},
        "seconds_per_step": plan.seconds.step,
        "seconds_per_round": plan.seconds.round,
        "not_considered": list(plan.seconds.ignored),
        "feasible": plan.feasible,
        "reason": plan.reason,
        "change": dict(plan.change),
    }
