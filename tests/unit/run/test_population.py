"""Centralised training: all training examples in one place, measured as ever."""

import dataclasses

import pytest
import torch

import federations
from federations import LOCAL, MEASURED, TYPES, clients, one_block, opened
from polyrank.aggregation import FedIT, Full, assign
from polyrank.algebra import distance
from polyrank.data import sizes
from polyrank.errors import RankError
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.rounds import Sampling
from polyrank.run import RunSettings
from polyrank.run.population import EVERYONE, population
from polyrank.seeds import derive
from polyrank.training import Job, LocalTraining, prepare, train_cohort
from polyrank.training.encoding import Encoding

POOLED = RunSettings(evaluation=MEASURED, pooled=True)


@pytest.fixture(scope="module")
def model():
    return one_block()


@pytest.fixture(scope="module")
def work(model):
    return prepare(clients(), model, Encoding())[0]


def of(work, model, settings=POOLED, local=LOCAL, **changes):
    return population(
        work,
        dataclasses.replace(federations.fleet(clients()), **changes),
        local,
        settings,
        model.spec,
    )


def test_everyone_has_the_training_rows_of_all_seen_clients_in_order(work, model):
    who = of(work, model)
    assert who.clients == [*who.work] == [EVERYONE]
    rows = who.work[EVERYONE].rows
    assert [*rows["train"]] == [row for id in sorted(work) for row in work[id].rows["train"]]
    assert [*sizes(rows["train"])] == [
        s for id in sorted(work) for s in sizes(work[id].rows["train"])
    ]
    assert not rows["validation"]
    assert not rows["test"]


def test_everyone_has_the_strongest_type_and_no_cut(work, model):
    who = of(work, model, cuts={"large": CutPoint(1)})
    assert who.fleet == Fleet(TYPES, {EVERYONE: "large"})
    types = {name: LoRAType(name, {"all": rank}) for name, rank in (("a", 2), ("b", 5), ("c", 1))}
    others = Fleet.table({"c0": "a", "c1": "b", "c2": "c", "c3": "c"}, types=types)
    assert population(work, others, LOCAL, POOLED, model.spec).fleet.assigned == {EVERYONE: "b"}
    small = Fleet.table(dict.fromkeys(federations.fleet(clients()).assigned, "small"), types=TYPES)
    assert population(work, small, LOCAL, POOLED, model.spec).fleet.assigned == {EVERYONE: "small"}


@pytest.mark.parametrize(
    ("sampling", "steps", "epochs"),
    [(Sampling(), 4 * 3, 2.0), (Sampling(number=2), 2 * 3, 1.0), (Sampling(fraction=0.25), 3, 0.5)],
)
def test_a_round_is_as_long_as_those_of_the_federated_clients_together(
    work, model, sampling, steps, epochs
):
    run_settings = dataclasses.replace(POOLED, sampling=sampling)
    by_steps = of(work, model, run_settings, LocalTraining(epochs=None, steps=3)).local
    assert (by_steps.steps, by_steps.epochs) == (steps, None)
    by_epochs = of(work, model, run_settings, LocalTraining(epochs=2)).local
    assert (by_epochs.steps, by_epochs.epochs) == (None, epochs)


def test_without_pooling_everything_is_as_it_was(work, model):
    fleet = federations.fleet(clients())
    who = population(work, fleet, LOCAL, RunSettings(evaluation=MEASURED), model.spec)
    assert (who.work, who.fleet, who.local, who.evaluation) == (work, fleet, LOCAL, MEASURED)
    assert who.clients == ["c0", "c1", "c2", "c3"]


def test_a_seen_client_without_a_type_is_named(work, model):
    with pytest.raises(RankError, match=r"no LoRA type for the clients .'c3'."):
        of(work, model, assigned={"c0": "small", "c1": "large", "c2": "large"})


def test_a_pooled_run_trains_everyone_once_a_round_and_measures_the_clients(tmp_path):
    model = one_block(dtype=torch.float64)
    local = LocalTraining(lr=0.02, batch=4, epochs=1)
    given = {"model": model, "rule": FedIT(), "local": local, "settings": POOLED}
    with opened(tmp_path / "run", **given) as run:
        [record] = run.rounds(1)
        state = run.state
        summary = run.finish()
        before = run.rule.init(_spec(run))
        ranks = dict(run.ranks[EVERYONE])
        scale = {site: POOLED.scaling.scale(rank) for site, rank in ranks.items()}
        assignment = assign(run.rule, before, ranks, scale, derive(0, 1, "deal"))
        rows = [row for id in sorted(run.work) for row in run.work[id].rows["train"]]
        seed = derive(0, 1, 0, EVERYONE, "train")
        [by_hand] = train_cohort(model, [Job(EVERYONE, assignment, rows, local, seed)])
    assert record.clients == [EVERYONE]
    assert record.ranks == {"large": 1}
    assert record.evaluation["own_rank"] is None
    assert record.evaluation["server"]["seen"]["clients"] == 4
    assert (summary["final"]["seen"]["clients"], summary["final"]["unseen"]["clients"]) == (4, 1)
    assert summary["method"] == "fedit, pooled"
    adapter = FedIT().adapter(state)
    for site, delta in by_hand.adapter.items():
        assert distance(delta, adapter[site]) < 1e-12


def _spec(run):
    from polyrank.run import setup

    return setup.fleet_spec(run._round_settings, run.fleet, run.model.spec, None)


def test_a_pooled_run_goes_on_with_the_same_bytes(tmp_path):
    given = {"rule": Full(), "settings": POOLED}
    with opened(tmp_path / "whole", **given) as run:
        list(run.rounds(3))
        whole = run.adapter.factors.hash()
    with opened(tmp_path / "parts", **given) as run:
        list(run.rounds(1))
    with opened(tmp_path / "parts", **given, resume=True) as run:
        assert run.round == 1
        list(run.rounds(3))
        assert run.adapter.factors.hash() == whole
