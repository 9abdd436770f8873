"""Scores that clients measure on their own machines."""

from dataclasses import replace

import pytest
import torch

from federations import MEASURED, QUIET, SITES, clients, one_block, opened
from memory_channel import After, Clock, MemoryChannel, NoReply
from models import random_adapter, tiny_loaded
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery, LocalEvaluator
from polyrank.planning import CutPoint, Fleet, LoRAType, Trace
from polyrank.protocol.evaluate import write_client_metrics
from polyrank.rounds.settings import Sampling
from polyrank.run import RunSettings
from polyrank.training.client_data import prepare
from polyrank.training.encoding import Encoding
from remote_federations import Reachable, channel_to_each, machines, remote_federation

MODEL = one_block(torch.float64)
NAMES = tuple(sorted(clients()))
QUERIES = (
    EvaluateQuery(None, NAMES, "test", True),
    EvaluateQuery(random_adapter(MODEL), NAMES[::-1], "validation"),
    EvaluateQuery(random_adapter(MODEL, seed=1), ("c1", "u0"), "validation"),
)


def asked(channel, queries=QUERIES):
    told = []
    found = Reachable.by(channel).evaluator(tell=told.append).evaluate(queries)
    told.remove(f"asked {len(channel.sent)} machines for scores")
    return found, told


def messages(each=1, trouble=None):
    return MemoryChannel(machines(each=each, model=MODEL), trouble, clock=Clock())


@pytest.mark.parametrize("each", [1, 2, 5])
def test_scores_are_those_of_one_process_and_every_machine_is_asked_once(each):
    work, _ = prepare(clients(), MODEL, Encoding())
    expected = LocalEvaluator(MODEL, work, MEASURED).evaluate(QUERIES)
    channel = messages(each)
    found, told = asked(channel)
    for query, one, other in zip(QUERIES, found, expected, strict=True):
        assert list(one.clients) == list(query.clients), "in the order of the query"
        assert one.no_room == other.no_room
        for id, scores in other.clients.items():
            mine = {name: score for name, score in one.clients[id].items() if score is not None}
            its = {name: score for name, score in scores.items() if score is not None}
            assert mine == pytest.approx(its, rel=1e-9)
    assert [message.node for message in channel.sent] == sorted(channel.machines)
    assert told == []


def test_who_holds_only_some_blocks_is_not_asked():
    channel = messages()
    cut = frozenset({"c1", "c2"})
    found, told = asked(channel, [replace(one, cut=cut) for one in QUERIES])
    assert [list(one.clients) for one in found] == [
        ["c0", "c3", "u0"],
        ["u0", "c3", "c0"],
        ["u0"],
    ]
    assert len(channel.sent) == 3
    assert told == ["not scored, for they hold only some blocks of the model: c1, c2"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (lambda one, p: After(p, None), "machine 2 has no scores: none came within 5 s"),
        (lambda one, p: After(p, 100.0), "machine 2 has no scores: none came within 5 s"),
        (lambda one, p: NoReply("error 5"), "machine 2 has no scores: error 5"),
        (lambda one, p: p[:9], "scores of machine 2 are not used: "),
        (
            lambda one, p: write_client_metrics([ClientMetrics({})]),
            "scores of machine 2 are not used: ",
        ),
        (
            lambda one, p: write_client_metrics(
                [ClientMetrics({"c3": {"loss": 0.0, "exact_match": 1.0, "rouge_l": 1.0}})] * 3
            ),
            "scores of machine 2 are not used: ",
        ),
    ],
)
def test_a_machine_without_usable_scores_is_left_out_and_told_of(trouble, told):
    found, lines = asked(messages(trouble=lambda o, p: trouble(o, p) if o.node == 2 else p))
    assert all("c1" not in one.clients for one in found)
    assert [len(one.clients) for one in found] == [4, 4, 1]
    assert len(lines) == 1
    assert lines[0].startswith(told)


def test_a_machine_that_cannot_be_reached_is_left_out_and_told_of():
    channel = messages()
    reached = Reachable.by(channel)
    channel.unreachable.add(2)
    told = []
    found = reached.evaluator(tell=told.append).evaluate(QUERIES)
    assert all("c1" not in one.clients for one in found)
    assert told[0] == "machine 2 has no scores: it cannot be reached"
    assert len(told) == 2


def test_scores_that_had_come_by_the_deadline_count_however_long_asking_took():
    channel = messages()

    def slow(_, payload):
        channel.clock.now += 10
        return payload

    channel.trouble = slow
    found, told = asked(channel)
    assert [len(one.clients) for one in found] == [5, 5, 2]
    assert told == []


def test_a_run_whose_clients_score_nothing_goes_on_without_scores():
    run_settings = RunSettings(evaluation=MEASURED, cohort=1)
    silent = channel_to_each()
    silent.trouble = lambda one, p: NoReply("gone") if one.kind == "evaluate" else p
    with remote_federation(silent, settings=run_settings) as made:
        (record,) = made.rounds(1)
        summary = made.finish()
        found = made.adapter.factors.hash()
    assert record.evaluation["server"]["seen"]["loss"] is None
    assert record.evaluation["own_rank"]["all"]["clients"] == 0
    assert summary["final"]["seen"] == {**summary["final"]["seen"], "loss": None, "clients": 0}
    with opened(settings=RunSettings(evaluation=QUIET, cohort=1)) as here:
        list(here.rounds(1))
        assert found == here.adapter.factors.hash()


def test_who_is_cut_is_known_from_the_round_also_of_clients_that_were_not_asked(tmp_path):
    types = {name: LoRAType(name, {"all": 2}) for name in ("one", "other")}
    schedule = Trace({2: {"c0": "other", "c1": "other"}, 3: {"c1": "one"}})
    changing = Fleet.table(dict.fromkeys(["c0", "c1", "c2", "c3"], "one"), types=types)
    changing = replace(changing, cuts={"other": CutPoint(1)}).with_schedule(schedule)
    model = tiny_loaded("llama", num_hidden_layers=2, sites=SITES)
    work, _ = prepare(clients(), model, Encoding())
    few = RunSettings(evaluation=MEASURED, cohort=1, sampling=Sampling(number=1))

    class Noting:
        """Scores here, and notes who of those asked for is said to be cut."""

        def __init__(self):
            self.inner, self.asked = LocalEvaluator(model, work, MEASURED), []

        def evaluate(self, queries):
            self.asked.append({id for one in queries for id in one.cut})
            return self.inner.evaluate(queries)

    def run(out, *, resume, until):
        evaluator = Noting()
        rest = {"fleet": changing, "settings": few, "evaluator": evaluator, "resume": resume}
        with opened(out, model=model, **rest) as made:
            list(made.rounds(until))
            if until == 3:
                made.finish()
        return [sorted(one) for one in evaluator.asked]

    begun = run(tmp_path / "run", resume=False, until=2)
    assert begun == [[], [], ["c0", "c1"]], "before the rounds, and after each"
    resumed = run(tmp_path / "run", resume=True, until=3)
    assert resumed == [["c0"], ["c0"]], "after the third, and at the end"
