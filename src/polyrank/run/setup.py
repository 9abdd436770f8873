"""What a run is set up with: ranks, weights and the server's rank, from fleet and conduct."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

from polyrank.aggregation import Assignment, FleetSpec, Rule, State
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import RankError
from polyrank.planning import CutPoint, Fleet, ModelSpec
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round
from polyrank.run.settings import RunSettings
from polyrank.training import LocalTraining
from polyrank.training.client_data import ClientWork


def round_settings(
    rule: Rule,
    fleet: Fleet,
    spec: ModelSpec,
    work: Mapping[str, ClientWork],
    conduct: RunSettings,
) -> RoundSettings:
    """Return what all rounds share.

    Raises RankError for a seen client without a LoRA type, ModelError for a cut outside the model.
    """
    fleet.check_cuts(spec)
    seen = [id for id, client in work.items() if client.seen]
    without = [id for id in seen if id not in fleet.assigned]
    if without:
        raise RankError(f"fleet: no LoRA type for the clients {without[:10]}; assign one each")
    by_type = fleet.ranks_by_type(spec)
    trained = {site for own in by_type.values() for site in own}

    def ranks_in(round: int) -> dict[str, Mapping[str, int]]:
        types = fleet.at(round)
        return {id: by_type[types[id]] for id in seen}

    examples = {id: len(work[id].rows["train"]) for id in seen}
    return RoundSettings(
        rule=rule,
        ranks=ranks_in(1),
        weights=conduct.weights.weights(examples),
        scaling=conduct.scaling,
        seed=conduct.seed,
        max_increment=conduct.faults.max_increment,
        clip_increment=conduct.faults.clip_increment,
        max_share=conduct.weights.most,
        ranks_in=lru_cache(2)(ranks_in) if fleet.schedule else None,
        cut_of=_cut_of(fleet) if fleet.cuts else None,
        held_by={cut: _held(cut, spec) & trained for cut in fleet.cuts.values()},
        sites=frozenset(spec.shapes),
    )


def _cut_of(fleet: Fleet) -> Callable[[str, int], CutPoint | None]:
    """(client, round) -> its cut; the types of a round are looked up once."""
    types = lru_cache(2)(fleet.at)
    return lambda client, round: fleet.cuts.get(types(round)[client])


def _held(cut: CutPoint, spec: ModelSpec) -> frozenset[str]:
    """The sites in the blocks that a client of this cut holds."""
    blocks = cut.at_client(spec.blocks)
    return frozenset(site.name for site in spec.sites if site.block in blocks)


def check_names(fleet: Fleet, clients: Iterable[str]) -> None:
    """Raise RankError if the fleet names a client that does not exist."""
    known = list(clients)
    unknown = sorted(set(fleet.assigned) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RankError(f"fleet: there are no clients {unknown[:10]}{hint}")


def fleet_spec(
    settings: RoundSettings, fleet: Fleet, spec: ModelSpec, server_rank: int | None
) -> FleetSpec:
    """Return what the rule is told: the server keeps each site at the fleet's largest rank.

    Ranks that come with a later round count too. `server_rank`, if given, is taken everywhere
    instead, where the matrix allows it.
    """
    by_type = fleet.ranks_by_type(spec)
    largest: dict[str, int] = {}
    for own in by_type.values():
        for site, rank in own.items():
            largest[site] = max(rank, largest.get(site, 0))
    shapes = {site: spec.shapes[site] for site in largest}
    if server_rank is not None:
        largest = {site: min(server_rank, *shapes[site]) for site in largest}
    later = {f"any of type {name}": own for name, own in by_type.items()} if fleet.schedule else {}
    return FleetSpec(shapes, {**settings.ranks, **later}, largest, settings.seed)


def heaviest_assignments(
    settings: RoundSettings, spec: FleetSpec, state: State
) -> list[Assignment]:
    """Return what is dealt in the first round, once for each set of ranks, made as heavy as later.

    A frozen term that only comes with later rounds is there as zeros.
    """
    round = Round(settings, state, 1, 0, list(settings.ranks))
    dealt = {id(one): one for one in map(round.assignment, round.clients)}.values()
    ranks = settings.rule.frozen_ranks(spec)
    if not ranks:
        return [*dealt]
    zeros = {
        site: LowRank(torch.zeros(spec.shapes[site][0], r), torch.zeros(r, spec.shapes[site][1]))
        for site, r in ranks.items()
    }
    return [dataclasses.replace(one, frozen=Adapter(zeros)) for one in dealt]


def described(
    rule: Rule, fleet: Fleet, local: LocalTraining, conduct: RunSettings, cohort: int
) -> dict[str, Any]:
    """Return the settings that a run's bytes depend on, as JSON; the fleet as its hash."""
    ranks = {name: dict(kind.ranks) for name, kind in fleet.types.items()}
    cuts = {name: cut.written for name, cut in sorted(fleet.cuts.items())}
    changing = [] if fleet.schedule is None else [dataclasses.asdict(fleet.schedule)]
    table = json.dumps([ranks, dict(fleet.assigned), *changing], sort_keys=True)
    return {
        "rule": rule.name,
        "cohort": cohort,
        "options": _fields(rule),
        "local": _fields(local),
        "conduct": {key: item for key, item in _fields(conduct).items() if key != "cohort"},
        "fleet": hashlib.sha256(table.encode()).hexdigest(),
        **({"cuts": cuts} if cuts else {}),
    }


def _fields(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON.

    A field that came with a later version (metadata ``later``) is in it only where it differs from
    its default, so that folders of before can be resumed.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    found = dataclasses.asdict(value)
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.metadata.get("later") and item == field.default:
            del found[field.name]
        elif dataclasses.is_dataclass(item):
            found[field.name] = _fields(item)
    return found
