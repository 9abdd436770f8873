"""What every engine must give: a task's answer, true to its assignment; here the one in process."""

import hashlib
from dataclasses import replace

import pytest
import torch

from federations import LOCAL, clients, fleet, one_block
from polyrank.aggregation import FFA, FlexLoRA, FLoRA, HetLoRA, SLoRA
from polyrank.algebra import Adapter, LowRank, Sparse
from polyrank.errors import ResourceError
from polyrank.federation import Conduct, prepare, setup
from polyrank.federation import engine as engines
from polyrank.federation.engine import InProcess
from polyrank.federation.judge import METRICS
from polyrank.federation.round import Round
from polyrank.federation.settings import Encoding

DATA = clients(seen=5)


@pytest.fixture(scope="module")
def model():
    return one_block()


@pytest.fixture(params=[1, 3])
def engine(request, model):
    work, _ = prepare(DATA, model, Encoding())
    return InProcess(model, work, LOCAL, request.param)


@pytest.fixture
def round(model, engine):
    settings = setup.round_settings(FlexLoRA(), fleet(DATA), model.spec, engine.work, Conduct())
    spec = setup.fleet_spec(settings, fleet(DATA), model.spec, None)
    return Round(settings, settings.rule.init(spec), 1, 0, sorted(settings.ranks))


RULES = [  # with what their assignments are like in some of three rounds
    (FlexLoRA(), {"factors"}),
    (FlexLoRA("tail-in-base"), {"factors", "frozen"}),
    (FFA(), {"factors", "B alone"}),
    (HetLoRA(), {"factors", "penalty"}),
    (FLoRA(), {"factors", "merged"}),
    (FLoRA(reinitialise=False), {"factors", "merged", "frozen"}),
    (SLoRA(FlexLoRA(), 2), {"sparse", "factors"}),
    (SLoRA(HetLoRA(), 1), {"sparse", "factors", "penalty"}),
]


def kinds(assignment):
    """What must be done to execute an assignment."""
    marks = {
        "factors": any(isinstance(d, LowRank) for d in assignment.start.values()),
        "sparse": any(isinstance(d, Sparse) for d in assignment.start.values()),
        "frozen": bool(assignment.frozen),
        "merged": bool(assignment.merged),
        "B alone": assignment.train == "b",
        "penalty": assignment.penalty is not None,
    }
    return {name for name, is_so in marks.items() if is_so}


def answers(engine, round, on_step=None):
    found = {}
    for cohort in engine.cohorts(round.clients):
        for answer in engine.execute([round.task(client) for client in cohort], on_step):
            found[answer.client] = answer
    return found


def test_every_task_is_answered_once_and_acceptably(engine, round):
    found = answers(engine, round)
    assert sorted(found) == round.clients
    for answer in found.values():
        round.accept(answer)
        assert answer.examples == len(DATA[answer.client].train)
        assert set(METRICS) <= set(answer.metrics)
        assert all(delta.b.device.type == "cpu" for delta in answer.adapter.values())
    assert round.rejected == {}


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=[rule.name for rule, _ in RULES])
def test_assignments_of_every_kind_are_answered_acceptably_round_after_round(
    model, engine, rule, expected
):
    settings = setup.round_settings(rule, fleet(DATA), model.spec, engine.work, Conduct())
    spec = setup.fleet_spec(settings, fleet(DATA), model.spec, None)
    state, met = settings.rule.init(spec), set()
    for number in (1, 2, 3):
        round = Round(settings, state, number, 0, sorted(settings.ranks))
        found = answers(engine, round)
        for client, answer in found.items():
            assignment = round.assignment(client)
            met |= kinds(assignment)
            round.accept(answer)
            assert answer.adapter.hash() != assignment.start.hash(), "it was trained"
        state, _ = round.aggregate(lambda client, site, of=found: of[client].adapter[site])
    assert met == expected


def test_what_is_trained_is_what_was_dealt(engine, round, monkeypatch):
    """A client that takes no step at all returns its assignment, bit by bit."""
    monkeypatch.setattr(
        engines, "train_cohort", untrained := lambda _, jobs, __: [Kept(j) for j in jobs]
    )
    assert untrained
    for client, answer in answers(engine, round).items():
        assert answer.assignment == round.assignment_hash(client)
        assert answer.adapter.hash() == round.assignment(client).start.hash()


class Kept:
    """What training would return that changed nothing."""

    failure, metrics = None, {}

    def __init__(self, job):
        self.adapter = job.assignment.start


def test_a_client_that_diverges_answers_with_a_failure_and_the_others_with_updates(
    engine, round, monkeypatch
):
    whole = engines.Job

    def job(client, assignment, *rest):
        if client == "c1":
            broken = {s: d.scale(float("nan")) for s, d in assignment.start.items()}
            assignment = replace(assignment, start=Adapter(broken))
        return whole(client, assignment, *rest)

    monkeypatch.setattr(engines, "Job", job)
    found = answers(engine, round)
    assert (found["c1"].round, found["c1"].attempt) == (1, 0)
    assert "c1, step 1" in found["c1"].reason
    round.fail(found.pop("c1"))
    for answer in found.values():
        round.accept(answer)
    assert list(round.rejected) == ["c1"]


def test_it_asks_between_steps_whether_to_go_on(engine, round):
    steps = []

    class Enough(Exception):
        pass

    def stop():
        steps.append(1)
        if len(steps) == 3:
            raise Enough

    with pytest.raises(Enough):
        answers(engine, round, stop)
    assert not any(child._forward_hooks for child in engine.model.module.modules())


def test_cohorts_hold_every_client_once_and_do_not_depend_on_the_order_of_asking(engine):
    ids = sorted(engine.work)[:5]
    made = engine.cohorts(ids)
    assert sorted(id for cohort in made for id in cohort) == ids
    assert all(len(cohort) <= engine.cohort for cohort in made)
    assert made == engine.cohorts(ids[::-1])
    sizes = [len(engine.work[id].rows["train"]) for cohort in made for id in cohort]
    assert sizes == sorted(sizes), "like amounts of work come together"


def test_memory_that_runs_out_is_an_error_that_says_what_to_lower(engine, round, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engines, "train_cohort", full)
    with pytest.raises(ResourceError, match=r"cpu does not hold \d clients .*lower engine\.cohort"):
        answers(engine, round)


def test_an_assignment_is_hashed_once_for_all_its_clients(engine, round, monkeypatch):
    counted = []
    real = hashlib.sha256
    monkeypatch.setattr(Adapter, "hash", lambda self: counted.append(1) or real().hexdigest())
    answers(engine, round)
    assert len(counted) == 2 * 3, "start and frozen term of three kinds of clients"
