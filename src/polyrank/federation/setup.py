"""What a run is set up with: ranks, weights and the server's rank, from fleet and conduct."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from polyrank.aggregation import FleetSpec, Rule
from polyrank.errors import RankError
from polyrank.federation.round import RoundSettings
from polyrank.federation.settings import Conduct
from polyrank.federation.work import ClientWork
from polyrank.planning import Fleet, ModelSpec
from polyrank.training import LocalTraining


def round_settings(
    rule: Rule,
    fleet: Fleet,
    spec: ModelSpec,
    work: Mapping[str, ClientWork],
    conduct: Conduct,
) -> RoundSettings:
    """Return what all rounds share; RankError for a seen client without a LoRA type."""
    seen = [id for id, client in work.items() if client.seen]
    without = [id for id in seen if id not in fleet.assigned]
    if without:
        raise RankError(f"fleet: no LoRA type for the clients {without[:10]}; assign one each")
    ranks = fleet.ranks(spec)
    examples = {id: len(work[id].rows["train"]) for id in seen}
    return RoundSettings(
        rule=rule,
        ranks={id: ranks[id] for id in seen},
        weights=conduct.weights.weights(examples),
        scaling=conduct.scaling,
        seed=conduct.seed,
        max_increment=conduct.faults.max_increment,
    )


def check_names(fleet: Fleet, clients: Iterable[str]) -> None:
    """Raise RankError if the fleet names a client that does not exist."""
    known = list(clients)
    unknown = sorted(set(fleet.assigned) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RankError(f"fleet: there are no clients {unknown[:10]}{hint}")


def fleet_spec(settings: RoundSettings, spec: ModelSpec, server_rank: int | None) -> FleetSpec:
    """Return what the rule is told: the server keeps each site at the fleet's largest rank.

    `server_rank`, if given, is taken everywhere instead, where the matrix allows it.
    """
    largest: dict[str, int] = {}
    for own in {id(own): own for own in settings.ranks.values()}.values():
        for site, rank in own.items():
            largest[site] = max(rank, largest.get(site, 0))
    shapes = {site: spec.shapes[site] for site in largest}
    if server_rank is not None:
        largest = {site: min(server_rank, *shapes[site]) for site in largest}
    return FleetSpec(shapes, settings.ranks, largest, settings.seed)


def described(
    rule: Rule, fleet: Fleet, local: LocalTraining, conduct: Conduct, cohort: int
) -> dict[str, Any]:
    """Return the settings that a run's bytes depend on, as JSON; the fleet as its hash."""
    ranks = {name: dict(kind.ranks) for name, kind in fleet.types.items()}
    table = json.dumps([ranks, dict(fleet.assigned)], sort_keys=True)
    return {
        "rule": rule.name,
        "cohort": cohort,
        "options": _fields(rule),
        "local": _fields(local),
        "conduct": {key: item for key, item in _fields(conduct).items() if key != "cohort"},
        "fleet": hashlib.sha256(table.encode()).hexdigest(),
    }


def _fields(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {}  # type: ignore[arg-type]
