"""A recipe looked through before it runs: data, ranks, memory and time; nothing is trained."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import torch

from polyrank.config.recipe import UNLIMITED
from polyrank.data import Skipped, sizes
from polyrank.model import resolve_device
from polyrank.planning import CostModel, CutPoint, Fleet, PlanSettings
from polyrank.planning.cost import Memory
from polyrank.planning.plan import in_units
from polyrank.run import planner_of
from polyrank.run.engine import InProcessEngine
from polyrank.run.population import Population
from polyrank.run.setup import set_up
from polyrank.runner.measure_device import free_memory, rate
from polyrank.runner.parts import Invocation, LocalParts, federation_of
from polyrank.training.client_data import Part

if TYPE_CHECKING:
    from polyrank.config import Recipe

Ranks = Mapping[str, int]

NAMED = 5
"""How many of the rows that are left out for one reason are named."""


@dataclass(frozen=True)
class TypeCheck:
    """A LoRA type, or a planned device: its clients, `ranks` as rank -> matrices, cut and memory.

    `memory` is what training one such client takes on a machine of its own.
    """

    name: str
    clients: int
    ranks: Mapping[int, int]
    cut: CutPoint | None
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        cut = None if self.cut is None else self.cut.written
        return {**asdict(self), "cut": cut, "memory_bytes": self.memory.total}


@dataclass(frozen=True)
class TimeCheck:
    """A lower bound of the training time: `operations` of all rounds at the measured `rate`.

    `operations` are those of the run and of its control, `of_control` those of the control alone
    (0: there is none). Evaluation, aggregation and everything but matrix products take time beside.
    """

    operations: float
    rate: float
    of_control: float

    @property
    def seconds(self) -> float:
        """Seconds that training takes at least."""
        return self.operations / self.rate


@dataclass(frozen=True)
class RecipeCheck:
    """What a run of a recipe would do here.

    `training` clients train, `a_round` of them in a round; `held_out` clients are only tested.
    `examples` are counted by part, `tokens` are those of each client's training examples, `targets`
    those of all that carry loss, `longest` those of the longest example. `needed` and `free` are
    bytes on `device`. `problems` say why the run would be refused.
    """

    name: str
    model: str
    blocks: int
    matrices: int
    rounds: int
    training: int
    held_out: int
    a_round: int
    examples: Mapping[str, int]
    tokens: Mapping[str, int]
    targets: int
    longest: int
    skipped: Skipped
    types: tuple[TypeCheck, ...]
    device: str
    needed: int
    free: int
    time: TimeCheck
    problems: tuple[str, ...]

    @property
    def can_run(self) -> bool:
        """Whether nothing was found that would stop the run."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a JSON object."""
        tokens = sorted(self.tokens.values())
        return {
            "name": self.name,
            "model": self.model,
            "blocks": self.blocks,
            "matrices": self.matrices,
            "rounds": self.rounds,
            "clients": {
                "training": self.training,
                "held_out": self.held_out,
                "a_round": self.a_round,
            },
            "examples": dict(self.examples),
            "tokens": {
                "train": sum(tokens),
                "with_loss": self.targets,
                "longest_example": self.longest,
                "least_of_a_client": tokens[0],
                "median_of_a_client": statistics.median(tokens),
                "most_of_a_client": tokens[-1],
                "by_client": dict(self.tokens),
            },
            "skipped": {reason: [*rows] for reason, rows in self.skipped.rows.items()},
            "types": [kind.to_json() for kind in self.types],
            "memory": {"device": self.device, "needed_bytes": self.needed, "free_bytes": self.free},
            "time": {
                "operations": self.time.operations,
                "operations_of_control": self.time.of_control,
                "operations_per_second": self.time.rate,
                "seconds_at_least": self.time.seconds,
            },
            "problems": [*self.problems],
        }


def check(recipe: Recipe, invocation: Invocation) -> RecipeCheck:
    """Return what a run of a recipe would do here.

    The data is read; of the model only configuration and tokenizer are. Raises what the run would
    raise before it trains, as far as that needs no weights.
    """
    recipe = recipe.resolved()
    parts = LocalParts(recipe, invocation, recipe.model.load_bare)
    federation = federation_of(recipe, parts, invocation)
    model, settings, spec = federation.model, federation.settings, federation.model.spec
    # An engine of its own keeps `set_up` from measuring a pass of the model, which has no weights.
    engine = InProcessEngine(model, {}, federation.local, 1, settings.split)
    setup = set_up(replace(federation, engine=engine))
    who = setup.population
    cost = planner_of(
        model,
        who.work,
        who.local,
        settings,
        PlanSettings(cuts="none"),
        UNLIMITED,
        scored=setup.plans.metric is not None,
    ).cost
    ranks = who.fleet.ranks_by_type(spec)
    device = resolve_device(recipe.model.device)
    needed = max(cost.memory(own, None).total for own in ranks.values())
    free = free_memory(device)
    problems = []
    if needed > free:
        problems.append(
            f"memory: a client takes {in_units(needed)} by estimate, and {in_units(free)} are free "
            f"on {device}; lower local.batch or data.max_length, or set model.checkpointing = true"
        )
    seen = {id: [*sizes(client.rows["train"])] for id, client in setup.work.items() if client.seen}
    taking_part = settings.sampling.count(len(who.clients))
    clients_in_all = recipe.rounds * taking_part
    of_control = 0.0
    if recipe.control is not None:
        alike = replace(who, fleet=who.fleet.forced(recipe.control, spec))
        of_control = clients_in_all * _operations(alike, alike.fleet.ranks_by_type(spec), cost)
    torch.set_num_threads(recipe.engine.threads)
    return RecipeCheck(
        name=recipe.name,
        model=model.source,
        blocks=spec.blocks,
        matrices=len(spec.sites),
        rounds=recipe.rounds,
        training=len(seen),
        held_out=len(setup.work) - len(seen),
        a_round=taking_part,
        examples={
            part: sum(len(client.rows[part]) for client in setup.work.values())
            for part in get_args(Part)
        },
        tokens={id: sum(size.tokens for size in rows) for id, rows in seen.items()},
        targets=sum(size.targets for rows in seen.values() for size in rows),
        longest=max(size.tokens for rows in seen.values() for size in rows),
        skipped=setup.skipped,
        types=tuple(_types(who.fleet, ranks, cost)),
        device=str(device),
        needed=needed,
        free=free,
        time=TimeCheck(
            clients_in_all * _operations(who, ranks, cost) + of_control,
            rate(model.dtype, device),
            of_control,
        ),
        problems=tuple(problems),
    )


def _types(fleet: Fleet, ranks: Mapping[str, Ranks], cost: CostModel) -> list[TypeCheck]:
    counts = Counter(fleet.at(1).values())
    return [
        TypeCheck(
            name,
            counts[name],
            dict(sorted(Counter(own.values()).items())),
            fleet.cuts.get(name),
            cost.memory(own, fleet.cuts.get(name)),
        )
        for name, own in sorted(ranks.items())
    ]


def _operations(who: Population, ranks: Mapping[str, Ranks], cost: CostModel) -> float:
    """The mean operations of a client's round, its examples as long as they are on average."""

    @cache
    def of_step(type: str, length: int, targets: int) -> int:
        load = replace(cost.workload, length=length, targets=targets)
        spent = CostModel(cost.anatomy, cost.spec, load).operations(ranks[type], None)
        return spent.client

    types = who.fleet.at(1)
    totals = []
    for id in who.clients:
        rows = [*sizes(who.work[id].rows["train"])]
        length, targets = (
            round(statistics.fmean(counts))
            for counts in ((row.tokens for row in rows), (row.targets for row in rows))
        )
        totals.append(who.local.steps_for(len(rows)) * of_step(types[id], length, targets))
    return statistics.fmean(totals)
