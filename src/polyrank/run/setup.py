"""The setup of a run: clients, ranks, weights, the first state and the engine."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from polyrank.aggregation import Assignment, FleetSpec, Rule, SLoRA, State
from polyrank.algebra import Adapter, LowRank
from polyrank.data import Skipped
from polyrank.errors import RankError, RecipeError
from polyrank.planning import CutPoint, Fleet, ModelSpec
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.engine import Engine
from polyrank.rounds.round import Round
from polyrank.run import preflight
from polyrank.run.checkpoint import Checkpoint
from polyrank.run.engine import InProcessEngine
from polyrank.run.population import Population, population
from polyrank.run.replanning import Replanning
from polyrank.run.settings import RunSettings
from polyrank.settings import stored
from polyrank.training import LocalTraining
from polyrank.training.client_data import ClientWork, prepare

if TYPE_CHECKING:
    from polyrank.run.federation import Federation


@dataclass
class Setup:
    """What a run derives from its parts before it has a folder.

    `work` are the clients that are measured, `fleet` has their types; `population` are those that
    train. `first` is the checkpoint before the first round, `heaviest` are assignments as heavy as
    they will come, `growth` the bytes by which the state may grow.
    """

    work: Mapping[str, ClientWork]
    skipped: Skipped
    fleet: Fleet
    population: Population
    plans: Replanning
    rounds: RoundSettings
    server_rank: Mapping[str, int]
    first: Checkpoint
    heaviest: Sequence[Assignment]
    growth: int
    engine: Engine


def set_up(parts: Federation) -> Setup:
    """Derive what a run needs from its parts; reads and writes no file.

    Raises RecipeError, DataError, RankError, RuleError or ResourceError if they do not fit.
    """
    model, rule, settings, planning = parts.model, parts.rule, parts.settings, parts.planning
    sparse = parts.local.resolved.sparse_rounds
    if sparse and not isinstance(rule, SLoRA):
        raise RecipeError(
            f"local.sparse_rounds = {sparse}: a rule of its own begins sparsely; give "
            f"rule=SLoRA(rule, {sparse})"
        )
    plans = Replanning(planning, pooled=settings.pooled)
    fleet = parts.fleet if plans.now is None else plans.now.fleet
    check_names(fleet, parts.clients)
    work, skipped = parts.prepared or prepare(parts.clients, model, settings.encoding)
    if parts.benchmark is not None:
        skipped += parts.benchmark.skipped
    who = population(work, fleet, parts.local, settings, model.spec)
    preflight.check_measures(settings, model, work, parts.benchmark)
    rounds = checked_round_settings(parts, who, who.fleet)
    spec = fleet_spec(rounds, who.fleet, model.spec, settings.server_rank)
    if planning is not None and not settings.pooled:
        spec = planning.most(spec)
    first = Checkpoint(0, rule.init(spec))
    heaviest = heaviest_assignments(rounds, spec, first.state)
    engine = parts.engine
    if engine is None:
        cohort = preflight.resolve_cohort(
            settings.cohort,
            model,
            spec,
            who.local,
            who.work,
            heaviest,
            scored=plans.metric is not None,
        )
        engine = InProcessEngine(model, who.work, who.local, cohort, settings.split)
    return Setup(
        work=work,
        skipped=skipped,
        fleet=fleet,
        population=who,
        plans=plans,
        rounds=rounds,
        server_rank=spec.server_rank,
        first=first,
        heaviest=heaviest,
        growth=rule.growth(spec),
        engine=engine,
    )


def checked_round_settings(parts: Federation, who: Population, fleet: Fleet) -> RoundSettings:
    """Return what all rounds with this fleet share, after checking its cuts."""
    preflight.check_cuts(parts.model, fleet, parts.rule, parts.settings.split)
    return round_settings(parts.rule, fleet, parts.model.spec, who.work, parts.settings)


def round_settings(
    rule: Rule,
    fleet: Fleet,
    spec: ModelSpec,
    work: Mapping[str, ClientWork],
    settings: RunSettings,
) -> RoundSettings:
    """Return what all rounds share.

    Raises RankError for a training client without a LoRA type, ModelError for a cut outside
    the model.
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
        weights=settings.weights.of(examples),
        scaling=settings.scaling,
        seed=settings.seed,
        max_increment=settings.faults.max_increment,
        clip_increment=settings.faults.clip_increment,
        max_share=settings.weights.max_share,
        ranks_in=lru_cache(2)(ranks_in) if fleet.schedule else None,
        cut_of=_cut_of(fleet) if fleet.cuts else None,
        sites_by_cut={cut: _client_sites(cut, spec) & trained for cut in fleet.cuts.values()},
        sites=frozenset(spec.shapes),
    )


def _cut_of(fleet: Fleet) -> Callable[[str, int], CutPoint | None]:
    """(client, round) -> its cut; the types of a round are looked up once."""
    types = lru_cache(2)(fleet.at)
    return lambda client, round: fleet.cuts.get(types(round)[client])


def _client_sites(cut: CutPoint, spec: ModelSpec) -> frozenset[str]:
    """The sites in the blocks that a client of this cut runs."""
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
    rounds: RoundSettings, fleet: Fleet, spec: ModelSpec, server_rank: int | None
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
    return FleetSpec(shapes, {**rounds.ranks, **later}, largest, rounds.seed)


def heaviest_assignments(rounds: RoundSettings, spec: FleetSpec, state: State) -> list[Assignment]:
    """Return the first round's assignments, once for each set of ranks, made as heavy as later.

    A frozen term that only comes with later rounds is in them as zeros.
    """
    round = Round(rounds, state, 1, 0, list(rounds.ranks))
    every = map(round.assignment, round.clients)
    assignments = {id(assignment): assignment for assignment in every}.values()
    ranks = rounds.rule.frozen_ranks(spec)
    if not ranks:
        return [*assignments]
    zeros = {
        site: LowRank(torch.zeros(spec.shapes[site][0], r), torch.zeros(r, spec.shapes[site][1]))
        for site, r in ranks.items()
    }
    return [replace(assignment, frozen=Adapter(zeros)) for assignment in assignments]


def described(
    rule: Rule, fleet: Fleet, local: LocalTraining, settings: RunSettings, cohort: int
) -> dict[str, Any]:
    """Return the settings that a run's bytes depend on, as JSON; the fleet as its hash."""
    ranks = {name: dict(kind.ranks) for name, kind in fleet.types.items()}
    cuts = {name: cut.written for name, cut in sorted(fleet.cuts.items())}
    changing = [] if fleet.schedule is None else [dataclasses.asdict(fleet.schedule)]
    table = json.dumps([ranks, dict(fleet.assigned), *changing], sort_keys=True)
    return {
        "rule": rule.name,
        "cohort": cohort,
        "options": stored(rule) if dataclasses.is_dataclass(rule) else {},
        "local": local.described(),
        "conduct": {key: item for key, item in stored(settings).items() if key != "cohort"},
        "fleet": hashlib.sha256(table.encode()).hexdigest(),
        **({"cuts": cuts} if cuts else {}),
    }
