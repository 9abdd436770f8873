"""Small planned federations: devices whose budgets are a little more than a share of the model."""

from collections.abc import Mapping
from typing import Any

import federations
from models import tiny_loaded
from polyrank.aggregation import rule
from polyrank.data.types import ClientData
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint, DeviceProfile, Fleet, LoRAType, Planner, PlanSettings
from polyrank.run import Planning, Run, RunSettings, planner_of
from polyrank.training import LocalTraining, prepare

LOCAL = LocalTraining(lr=0.02, batch=2, epochs=None, steps=2)
CONDUCT = RunSettings(evaluation=federations.QUIET, cohort=2)
LEVELS = PlanSettings(levels=(1, 2, 4), cuts="needed")
SERVER = DeviceProfile("server", 2**40, flops=1e12)
RATES: Mapping[str, Any] = {"flops": 1e9, "up": 1e6, "down": 2e6, "latency": 0.01}


def deep(**options: Any) -> LoadedModel:
    """Return a random Llama of three blocks, with three sites each."""
    return tiny_loaded("llama", num_hidden_layers=3, sites=federations.SITES, **options)


def devices(planner: Planner) -> dict[str, DeviceProfile]:
    """Return one device that must be cut, and two that need not be, of few ranks and of many."""
    whole = planner.cost.memory(dict.fromkeys(planner.spec.shapes, 1), None).total
    head = planner.cost.memory({}, CutPoint(1)).total
    more = planner.cost.memory(dict.fromkeys(planner.spec.shapes, 3), None).total
    budgets = {"phone": head + 1500, "laptop": whole + 2000, "station": more + 200}
    return {name: DeviceProfile(name, memory, **RATES) for name, memory in budgets.items()}


def tight(planner: Planner, at_once: int) -> DeviceProfile:
    """Return a server that affords tails of about rank 2 at every site."""
    behind = {site.name: 2 for site in planner.spec.sites if site.block >= 1}
    share = planner.cost.server_memory(behind, CutPoint(1)).total + 200
    base = planner.cost.memory({}, None).weights
    return DeviceProfile("server", base + at_once * share, flops=1e12)


def planning(
    model: LoadedModel | None = None,
    data: Mapping[str, ClientData] | None = None,
    *,
    run_settings: RunSettings = CONDUCT,
    local: LocalTraining = LOCAL,
    settings: PlanSettings = LEVELS,
    given: Mapping[str, DeviceProfile] | None = None,
    assigned: Mapping[str, str] | None = None,
    **options: Any,
) -> Planning:
    """Return a planning for these clients: phone, laptop, station, phone, … in order."""
    model = model or deep()
    data = data or federations.clients()
    work, _ = prepare(data, model, run_settings.encoding)
    scored = options.get("metric", "channel") is not None
    planner = planner_of(model, work, local, run_settings, settings, SERVER, scored=scored)
    planner.server = tight(planner, run_settings.sampling.count(4))
    known = given or devices(planner)
    seen = sorted(id for id, client in data.items() if client.seen)
    table = assigned or {id: [*known][i % len(known)] for i, id in enumerate(seen)}
    fleet = Fleet.table(table, types={name: LoRAType(name, {"all": 1}) for name in known})
    named = {name: known[name] for name in fleet.possible}
    return Planning(planner, named, fleet, **{"rounds": 4, "every": 1, **options})


def opened(
    out: Any = None,
    *,
    called: str = "flora",
    model: LoadedModel | None = None,
    planned: Planning | None = None,
    settings: RunSettings = CONDUCT,
    local: LocalTraining = LOCAL,
    rest: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Return a planned run; `options` are those of its planning, `rest` of `federations.run_of`."""
    model = model or deep()
    made = planned or planning(model, run_settings=settings, local=local, **options)
    return federations.run_of(
        out,
        model,
        federations.clients(),
        made.fleet,
        rule(called),
        local,
        settings,
        planning=made,
        **(rest or {}),
    )
