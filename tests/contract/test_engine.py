"""What every engine must give: a task's answer, true to its assignment, here and elsewhere."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from cut_fleets import CUTS, SPLIT_DATA, SPLIT_FLEET, TYPES, WHO, four_blocks
from federations import LOCAL, clients, fleet, one_block
from memory_channel import MemoryChannel
from polyrank.aggregation import RULES, FlexLoRA, HetLoRA, SLoRA
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.codecs import codec
from polyrank.errors import ModelError, ResourceError
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.rounds.messages import Failure
from polyrank.rounds.round import Round
from polyrank.rounds.validation import METRICS, WIRE
from polyrank.run import RunSettings, setup
from polyrank.run import engine as engines
from polyrank.run.engine import InProcessEngine
from polyrank.training import Job, prepare
from polyrank.training.client_data import everywhere
from polyrank.training.encoding import Encoding
from polyrank.training.split import ServerParts, SplitJob, SplitSettings, train_client_part
from polyrank.transport import FrameLimits, InProcessLinks
from polyrank.transport.remote import GrpcLink, SplitServer, new_identity
from remote_federations import Reachable, machines
from rules import ROWS

DATA = clients(seen=5)


@pytest.fixture(scope="module")
def model():
    return one_block()


@pytest.fixture(scope="module")
def work(model):
    return prepare(DATA, model, Encoding())[0]


@pytest.fixture(params=[1, 3])
def own(request, model, work):
    """The engine of this process, which has the data."""
    return InProcessEngine(model, work, LOCAL, request.param)


def elsewhere(model, each, **rest):
    """Return an engine that asks machines of so many clients each by messages."""
    channel = MemoryChannel(machines(DATA, each, model=model), singly=True)
    return Reachable.by(channel).engine(model, **rest)


@pytest.fixture(
    params=[
        pytest.param(lambda model, work: InProcessEngine(model, work, LOCAL, 1), id="one by one"),
        pytest.param(
            lambda model, work: InProcessEngine(model, work, LOCAL, 3), id="three at a time"
        ),
        pytest.param(lambda model, _: elsewhere(model, 1), id="elsewhere"),
        pytest.param(lambda model, _: elsewhere(model, 3), id="elsewhere, three on a machine"),
    ]
)
def engine(request, model, work):
    return request.param(model, work)


@pytest.fixture
def round(model, work):
    settings = setup.round_settings(FlexLoRA(), fleet(DATA), model.spec, work, RunSettings())
    spec = setup.fleet_spec(settings, fleet(DATA), model.spec, None)
    return Round(settings, settings.rule.init(spec), 1, 0, sorted(settings.ranks))


ASKED = [  # with what their assignments ask of training in some of three rounds
    *((RULES[name], row.asks) for name, row in ROWS.items()),
    (SLoRA(FlexLoRA(), 2), {"sparse", "factors"}),
    (SLoRA(HetLoRA(), 1), {"sparse", "factors", "penalty"}),
]


def kinds(assignment):
    """What must be done to execute an assignment."""
    marks = {
        "factors": any(isinstance(d, LowRank) for d in assignment.start.values()),
        "sparse": any(isinstance(d, Sparse) for d in assignment.start.values()),
        "dense": any(isinstance(d, Dense) for d in assignment.start.values()),
        "frozen": bool(assignment.frozen),
        "merged": bool(assignment.merged),
        "B alone": assignment.train == "b",
        "penalty": assignment.penalty is not None,
    }
    return {name for name, is_so in marks.items() if is_so}


def cuts_of(round):
    return lambda client: round.settings.cut(client, round.number)


def answers(engine, round, on_step=None):
    groups = engine.cohorts(round.clients, cuts_of(round))
    tasks = [[round.task(client) for client in group] for group in groups]
    given = list(engine.run(tasks, on_step))
    assert len({answer.client for answer in given}) == len(given)
    return {answer.client: answer for answer in given}


def test_every_task_is_answered_once_and_acceptably(engine, round):
    found = answers(engine, round)
    assert sorted(found) == round.clients
    for answer in found.values():
        round.accept(answer)
        assert answer.examples == len(DATA[answer.client].train)
        assert set(METRICS) <= set(answer.metrics)
        assert all(delta.b.device.type == "cpu" for delta in answer.adapter.values())
    assert round.rejected == {}


@pytest.mark.parametrize(("rule", "expected"), ASKED, ids=[rule.name for rule, _ in ASKED])
def test_assignments_of_every_kind_are_answered_acceptably_round_after_round(
    model, engine, work, rule, expected
):
    types = fleet(DATA, equal=not rule.mixed_ranks)
    settings = setup.round_settings(rule, types, model.spec, work, RunSettings())
    spec = setup.fleet_spec(settings, types, model.spec, None)
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


def test_training_starts_from_the_assignment(engine, round, monkeypatch):
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

    failure, metrics, importance = None, {}, {}

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


def test_it_asks_between_steps_whether_to_go_on(engine, round, model):
    steps = []

    class Enough(Exception):
        pass

    def stop():
        steps.append(1)
        if len(steps) == 3:
            raise Enough

    with pytest.raises(Enough):
        answers(engine, round, stop)
    assert not any(child._forward_hooks for child in model.module.modules())


def test_groups_hold_every_client_once_and_do_not_depend_on_the_order_of_asking(engine, round):
    ids, cut_of = round.clients, cuts_of(round)
    made = engine.cohorts(ids, cut_of)
    assert sorted(id for group in made for id in group) == ids
    assert all(len(group) <= engine.cohort for group in made)
    backwards = engine.cohorts(ids[::-1], cut_of)
    assert sorted(map(sorted, made)) == sorted(map(sorted, backwards))


def test_clients_of_like_amounts_of_work_come_together(own):
    engine, ids = own, sorted(own.work)[:5]
    made = engine.cohorts(ids)
    assert sorted(id for cohort in made for id in cohort) == ids
    assert all(len(cohort) <= engine.cohort for cohort in made)
    assert made == engine.cohorts(ids[::-1])
    sizes = [len(engine.work[id].rows["train"]) for cohort in made for id in cohort]
    assert sizes == sorted(sizes), "like amounts of work come together"


def test_memory_that_runs_out_is_an_error_that_says_what_to_lower(own, round, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engines, "train_cohort", full)
    with pytest.raises(ResourceError, match=r"cpu does not hold \d clients .*lower engine\.cohort"):
        answers(own, round)


def test_an_assignment_is_hashed_once_for_all_its_clients(own, round, monkeypatch):
    counted = []
    real = hashlib.sha256
    monkeypatch.setattr(Adapter, "hash", lambda self: counted.append(1) or real().hexdigest())
    answers(own, round)
    assert len(counted) == 2 * 3, "start and frozen term of three kinds of clients"


# --- tasks with a cut ---


@pytest.fixture(scope="module")
def deep():
    return four_blocks()


def split_engine(deep, cohort=3, who: Fleet = SPLIT_FLEET, **settings):
    """Return an engine over eight clients, five kinds of them cut, and a round of FlexLoRA."""
    work, _ = prepare(SPLIT_DATA, deep, Encoding())
    wire = SplitSettings(**{"wire": "float32", **settings})
    made = setup.round_settings(FlexLoRA(), who, deep.spec, work, RunSettings(split=wire))
    spec = setup.fleet_spec(made, who, deep.spec, None)
    round = Round(made, made.rule.init(spec), 1, 0, sorted(made.ranks))
    return InProcessEngine(deep, work, LOCAL, cohort, wire), round


def hashes(found) -> Mapping[str, str]:
    return {client: answer.adapter.hash() for client, answer in found.items()}


@pytest.mark.parametrize("cohort", [1, 3])
def test_split_tasks_are_answered_acceptably_with_the_sites_of_the_assignment(deep, cohort):
    engine, round = split_engine(deep, cohort)
    found = answers(engine, round)
    assert sorted(found) == round.clients
    for client, answer in found.items():
        round.accept(answer)
        assignment = round.assignment(client)
        assert answer.adapter.keys() == assignment.start.keys()
        for site, delta in answer.adapter.items():
            assert not torch.equal(delta.b, assignment.start[site].b), f"{client} trained {site}"
            assert delta.b.device.type == "cpu"
        assert set(METRICS) <= set(answer.metrics)
        carried = [answer.metrics.get(name, 0.0) for name in WIRE]
        assert all(number > 0 for number in carried) == (WHO[client] != "whole")
    assert len(found["c6"].adapter) == len(found["c7"].adapter) == 1
    assert round.rejected == {}


def test_answers_come_in_the_order_of_the_tasks(deep):
    engine, round = split_engine(deep)
    for cohort in engine.cohorts(round.clients, cuts_of(round)):
        for asked in (cohort, cohort[::-1]):
            given = engine.execute([round.task(client) for client in asked])
            assert [answer.client for answer in given] == asked


def test_cohorts_are_of_one_cut_unless_the_adapter_is_shared(deep):
    for adapters in ("own", "shared"):
        engine, round = split_engine(deep, adapters=adapters)
        cut_of = cuts_of(round)
        made = engine.cohorts(round.clients, cut_of)
        assert sorted(id for cohort in made for id in cohort) == round.clients
        assert made == engine.cohorts(round.clients[::-1], cut_of)
        split = [cohort for cohort in made if any(map(cut_of, cohort))]
        assert all(all(map(cut_of, cohort)) for cohort in split), "whole clients by themselves"
        if adapters == "shared":
            assert len(split) == 1
        else:
            assert all(len({*map(cut_of, cohort)}) == 1 for cohort in made)
            assert [c for c in made if cut_of(c[0]) == CutPoint(2)] == [["c6", "c7"]], (
                "of two types"
            )


def test_whole_and_split_tasks_are_not_trained_in_one_pass(deep):
    engine, round = split_engine(deep)
    with pytest.raises(ModelError, match="whole and split clients"):
        list(engine.execute([round.task("c0"), round.task("c5")]))


def test_what_a_client_reports_of_its_link_is_what_the_link_counted(deep, monkeypatch):
    opened = []

    class Counted(InProcessLinks):
        def link(self, client):
            opened.append(super().link(client))
            return opened[-1]

    monkeypatch.setattr(engines, "InProcessLinks", Counted)
    engine, round = split_engine(deep)
    found = answers(engine, round)
    assert sorted(link.client for link in opened) == sorted(set(found) - {"c5"})
    for link in opened:
        metrics = found[link.client].metrics
        assert (link.traffic.up, link.traffic.down) == tuple(metrics[name] for name in WIRE)
        assert link.closed


@pytest.mark.parametrize(
    ("adapters", "where", "broken"),
    [
        ("own", 0, {"c1", "c3"}),  # of two near ones, and of two around: at the client
        ("own", 2, {"c1", "c3"}),  # at the server
        ("own", 3, {"c1", "c3"}),  # at the server, and behind the upper cut
        ("shared", 0, {"c1", "c3"}),
        ("shared", 3, {"c3"}),
    ],
)
def test_a_split_client_that_diverges_fails_with_its_reason_and_its_bytes(
    deep, monkeypatch, adapters, where, broken
):
    who = Fleet.table({**WHO, **dict.fromkeys(("c2", "c6", "c7"), "near")}, types=TYPES, cuts=CUTS)
    who = replace(who, types={name: LoRAType(name, {"all": 2}) for name in TYPES})
    undisturbed = answers(*split_engine(deep, who=who, adapters=adapters))
    whole = engines.Job

    def job(client, assignment, *rest):
        if client in broken:
            start = {
                site: delta.scale(float("nan")) if f"layers.{where}." in site else delta
                for site, delta in assignment.start.items()
            }
            assignment = replace(assignment, start=Adapter(start))
        return whole(client, assignment, *rest)

    monkeypatch.setattr(engines, "Job", job)
    engine, round = split_engine(deep, who=who, adapters=adapters)
    found = answers(engine, round)
    assert {client for client, one in found.items() if isinstance(one, Failure)} == broken
    for client in broken:
        failure = found.pop(client)
        assert (failure.round, failure.attempt) == (1, 0)
        assert f"{client!r}, round 1, attempt 0, step 0" in failure.reason
        assert all(failure.metrics[name] >= 0 for name in WIRE)
        round.fail(failure)
    for answer in found.values():
        round.accept(answer)
    assert sorted(round.rejected) == sorted(broken)
    assert round.wire_up > 0
    if adapters == "own":  # in float32, sums of a smaller pass
        for client, answer in found.items():
            assert answer.metrics["loss"] == pytest.approx(
                undisturbed[client].metrics["loss"], rel=1e-5
            )


def test_a_split_cohort_asks_between_steps_and_leaves_nothing_on_the_model(deep):
    engine, round = split_engine(deep)
    before = answers(engine, round)
    for last in (1, 4):
        steps = []

        class Enough(Exception):
            pass

        def stop(steps=steps, last=last, enough=Enough):
            steps.append(1)
            if len(steps) == last:
                raise enough

        with pytest.raises(Enough):
            list(engine.execute([round.task("c3"), round.task("c4")], stop))
        hooked = [
            child
            for child in engine.model.module.modules()
            if child._forward_hooks or child._forward_pre_hooks
        ]
        assert hooked == []
    assert hashes(answers(engine, round)) == hashes(before), "nor of one round for the next"


def test_memory_that_runs_out_in_a_split_cohort_is_told_the_same_way(deep, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(engines, "train_split", full)
    engine, round = split_engine(deep)
    with pytest.raises(ResourceError, match=r"cpu does not hold \d clients .*lower engine\.cohort"):
        answers(engine, round)


# --- the same bytes over another link ---


def over_grpc(engine, task) -> tuple[Adapter, tuple[float, float]]:
    """Return what one client and its server train on two copies of the base, over gRPC."""
    at_client, at_server = four_blocks(), four_blocks()
    full = everywhere(task.assignment, at_client.spec)
    rows = engine.work[task.client].rows["train"]
    job = Job(task.client, full, rows, engine.local, task.seed)
    asked = SplitJob(job, task.cut, task.round, task.attempt)
    limits = {task.client: FrameLimits(1000, at_client.spec.hidden, codec(engine.split.wire))}
    with (
        ServerParts(at_server, [asked.at_server(at_server)]) as parts,
        SplitServer("127.0.0.1:0", new_identity(["127.0.0.1"]), "run") as server,
    ):
        opened = server.open([(parts, [task.client])], task.round, task.attempt, limits, 60.0)
        trained = train_client_part(at_client, asked, GrpcLink(opened[task.client]), engine.split)
        assert trained.failure is None
        server.close()
        adapter = Adapter({**trained.adapter, **parts.adapter(task.client)})
    carried = tuple(trained.metrics[name] for name in WIRE)
    return adapter.restrict(task.assignment.start), carried


@pytest.mark.parametrize("in_flight", [1, 3])
def test_grpc_gives_the_bytes_of_the_link_in_process(deep, in_flight):
    """One client at a time, in float32: the very same bits, and as many bytes on the way."""
    engine, round = split_engine(deep, 1, in_flight=in_flight)
    engine.local = replace(LOCAL, batch=1, accumulation=4, clip=0.5)
    for client in ("c0", "c2", "c3", "c6", "c7"):
        task = round.task(client)
        (answer,) = engine.execute([task])
        adapter, carried = over_grpc(engine, task)
        assert adapter.hash() == answer.adapter.hash(), client
        assert carried == tuple(answer.metrics[name] for name in WIRE)
    assert adapter.hash() != round.assignment(client).start.hash()
