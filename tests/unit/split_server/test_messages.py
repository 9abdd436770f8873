"""What is told to the split server's process and what it hands back, bit by bit."""

import json
from dataclasses import replace

import pytest
import torch

from by_hand import BENT, LOCAL, STRAIGHT, model_of_three, server_job
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import PacketError
from polyrank.planning.traffic import WireBytes
from polyrank.split_server.interface import ServerPartResult
from polyrank.split_server.messages import (
    ExpectedResult,
    read_job,
    read_merged,
    training_fields,
    write_job,
    write_merged,
)
from polyrank.training import Scoring
from polyrank.training.split import ServerPartJob

MODEL = model_of_three()


def job(cut=STRAIGHT) -> ServerPartJob:
    made = server_job(MODEL, "Zoë", cut, frozen=3, seed=4)
    local = replace(LOCAL, betas=(0.8, 0.95), clip=0)
    return replace(made, scoring=Scoring(3, "paper"), local=local)


def through(one: ServerPartJob) -> ServerPartJob:
    return read_job(write_job(one), json.loads(json.dumps(training_fields(one))))


@pytest.mark.parametrize("cut", [STRAIGHT, BENT])
def test_a_job_comes_back_as_it_was(cut) -> None:
    one = job(cut)
    back = through(one)
    assert back.assignment.hash() == one.assignment.hash()
    assert replace(back, assignment=one.assignment) == one


def test_jobs_of_other_kinds_come_back_too() -> None:
    one = job()
    deltas = {}
    for i, (site, delta) in enumerate(one.assignment.start.items()):
        m, n = delta.shape
        dense = Dense(torch.randn(m, n, dtype=torch.float64))
        sparse = Sparse(torch.randn(2, dtype=torch.float64), torch.tensor([1, m * n - 1]), (m, n))
        deltas[site] = dense if i % 2 else sparse
    plain = replace(one.assignment, start=Adapter(deltas), frozen=Adapter({}), penalty=None)
    for assignment in (plain, replace(one.assignment, train="b")):
        back = through(replace(one, assignment=assignment))
        assert back.assignment.hash() == assignment.hash()


def test_training_that_cannot_be_read_is_refused() -> None:
    one = job()
    told = training_fields(one)
    wrong = [
        None,
        {},
        {**told, "steps": None},
        {**told, "local": {**told["local"], "lr": -1.0}},
        {**told, "local": {**told["local"], "more": 1}},
    ]
    for bad in wrong:
        with pytest.raises(PacketError):
            read_job(write_job(one), bad)


def test_sums_come_back_as_they_were_and_nothing_else_passes_for_one() -> None:
    dense = Dense(torch.randn(3, 5))
    (back,) = read_merged(write_merged("a.b", dense)).items()
    assert back[0] == "a.b"
    assert torch.equal(back[1].matrix, dense.matrix)
    lowrank = LowRank(torch.randn(3, 2), torch.randn(2, 5))
    with pytest.raises(PacketError, match="expected Dense"):
        read_merged(write_merged("a.b", lowrank))  # type: ignore[arg-type]
    with pytest.raises(PacketError):
        read_merged(write_job(job()))


def test_what_was_trained_comes_back_and_nothing_that_was_not_asked_for() -> None:
    one = job()
    expected = ExpectedResult.of(one)
    trained = one.assignment.start.scale(1.5)
    scores = {site: float(i) for i, site in enumerate(trained)}
    given = ServerPartResult(trained, scores, WireBytes(123, 2**40))
    back = expected.read(expected.write(given))
    assert back.adapter.hash() == trained.hash()
    assert (back.importance, back.traffic) == (given.importance, given.traffic)

    for other in (replace(one, client="b"), replace(one, round=9), replace(one, attempt=5)):
        with pytest.raises(PacketError, match="what was trained of"):
            expected.read(ExpectedResult.of(other).write(given))
    with pytest.raises(PacketError, match="sites of the job"):
        expected.read(expected.write(replace(given, importance={"elsewhere": 1.0})))
    site = next(iter(trained))
    fewer = one.assignment.only(set(trained) - {site})
    less = ExpectedResult.of(replace(one, assignment=fewer))
    with pytest.raises(PacketError):
        less.read(expected.write(given))
    with pytest.raises(PacketError, match="length"):
        expected.read(bytes(expected.size_limits.nbytes + 1))
