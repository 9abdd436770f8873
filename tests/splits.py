"""Small federations of four blocks whose clients are cut, and the same without a cut.

carried_out(rule, CUTS["mixed"])       # -> Run(adapter, records, tasks, updates)
whole(rule)                            # the same, every client with the whole model
assert_same(one, other)                # adapters, losses, tokens; nobody was refused
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from federations import QUIET, SITES, clients, opened
from models import tiny_loaded
from polyrank.aggregation import Rule, Update
from polyrank.algebra import Adapter, Delta, distance
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.rounds import Sampling
from polyrank.rounds.messages import TrainTask
from polyrank.run import RoundRecord, RunSettings
from polyrank.run.engine import InProcessEngine
from polyrank.training import LocalTraining
from polyrank.training.split import SplitSettings

BLOCKS, ROUNDS = 4, 3
DATA = clients(seen=5, unseen=0)
LOCAL = LocalTraining(lr=0.02, batch=2, accumulation=2, epochs=1, dropout=0.1, clip=0.5)
UNEQUAL = {"a": 1, "b": 2, "c": 4, "d": 3}
EQUAL = dict.fromkeys("abcd", 2)
CUTS: Mapping[str, Mapping[str, CutPoint]] = {
    "whole": {},
    "split": dict.fromkeys("abcd", CutPoint(2)),
    "mixed": {"a": CutPoint(1), "b": CutPoint(3), "c": CutPoint(1, 3)},
}
"""Types by where they are cut; of the mixed ones d runs the whole model."""


EXACT = SplitSettings(wire="float64")
SHARED = SplitSettings(wire="float64", adapters="shared")


@cache
def model(dtype: torch.dtype = torch.float64, **changes: object) -> LoadedModel:
    return tiny_loaded("llama", num_hidden_layers=BLOCKS, dtype=dtype, sites=SITES, **changes)


def fleet(ranks: Mapping[str, int], cuts: Mapping[str, CutPoint]) -> Fleet:
    """Return the types a, b, c, d, a for the clients c0…c4."""
    types = {name: LoRAType(name, {"all": rank}) for name, rank in ranks.items()}
    who = {id: "abcd"[i % 4] for i, id in enumerate(sorted(DATA))}
    return Fleet.table(who, types=types, cuts=cuts)


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    adapter: Adapter[Delta]
    records: list[RoundRecord]
    tasks: list[TrainTask]
    updates: list[Update]


def carried_out(
    rule: Rule,
    cuts: Mapping[str, CutPoint] | Fleet,
    *,
    ranks: Mapping[str, int] | None = None,
    local: LocalTraining = LOCAL,
    dtype: torch.dtype = torch.float64,
    split: SplitSettings = EXACT,
    cohort: int = 2,
    seed: int = 0,
    number: int = 3,
    out: Path | None = None,
) -> Run:
    """Return a run of three rounds, with `number` of the five clients in each."""
    ranks = ranks or (UNEQUAL if rule.mixed_ranks else EQUAL)
    run_settings = RunSettings(
        seed=seed, sampling=Sampling(number=number), evaluation=QUIET, cohort=cohort, split=split
    )
    made = opened(
        out,
        model=model(dtype),
        data=DATA,
        fleet=cuts if isinstance(cuts, Fleet) else fleet(ranks, cuts),
        rule=rule,
        local=local,
        settings=run_settings,
    )
    with made as run:
        tasks, updates = watched(run.engine)
        records = list(run.rounds(ROUNDS))
        return Run(run.adapter.factors, records, tasks, updates)


def watched(engine: InProcessEngine) -> tuple[list[TrainTask], list[Update]]:
    """Return lists that fill with what the engine is asked and answers."""
    real, asked, given = engine.execute, [], []

    def execute(tasks, on_step=None):
        asked.extend(tasks)
        for answer in real(tasks, on_step):
            given.append(answer)
            yield answer

    engine.execute = execute  # type: ignore[method-assign]
    return asked, given


@cache
def whole(rule: Rule, local: LocalTraining = LOCAL, dtype: torch.dtype = torch.float64) -> Run:
    """Return the run in which every client has the whole model; its cohort is another one."""
    return carried_out(rule, {}, local=local, dtype=dtype, cohort=3)


def assert_same(one: Run, other: Run, tolerance: float = 1e-8) -> None:
    """Fail unless adapters and losses agree and everyone's update was accepted.

    In float64 the two ways differ by the order of sums alone: up to 2e-13 here, most where a rule
    subtracts nearly equal aggregates. A wire of float32 in their place would show: 2e-7.
    """
    assert [record.rejected for record in (*one.records, *other.records)] == [{}] * (
        len(one.records) + len(other.records)
    )
    assert [r.clients for r in one.records] == [r.clients for r in other.records]
    assert one.adapter.keys() == other.adapter.keys()
    for site, delta in one.adapter.items():
        assert distance(delta, other.adapter[site]) <= tolerance * max(1.0, delta.norm()), site
    for mine, its in zip(one.records, other.records, strict=True):
        assert mine.loss == pytest.approx(its.loss, rel=tolerance)
        assert (mine.tokens, mine.ranks) == (its.tokens, its.ranks)


def size(adapter: Adapter[Delta]) -> float:
    return sum(delta.norm() ** 2 for delta in adapter.values()) ** 0.5
