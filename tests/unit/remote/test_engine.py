"""The engine whose clients are elsewhere: what goes wrong with them, and what the round notes."""

from dataclasses import replace

import pytest

from federations import QUIET, SITES, one_block, opened
from memory_channel import After, Clock, MemoryChannel, NoReply
from models import tiny_loaded
from polyrank.aggregation import FLoRA, Update
from polyrank.algebra import Adapter
from polyrank.codecs import codec
from polyrank.errors import RoundFailedError, SplitServerError
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.protocol.client_info import ClientPolicy
from polyrank.protocol.size_limits import SizeLimits
from polyrank.protocol.train_request import read_train_request
from polyrank.protocol.train_result import read_train_result, write_train_result
from polyrank.remote import client, engine
from polyrank.rounds.messages import Failure
from polyrank.rounds.settings import Faults
from polyrank.run import RunSettings
from polyrank.run import engine as engines
from polyrank.split_server.interface import ServerPartResult
from polyrank.training.split import SplitSettings
from polyrank.transport import FrameLimits
from polyrank.transport.remote import Credentials, new_identity
from remote_federations import (
    Reachable,
    ask,
    channel_to_each,
    machine,
    machines,
    remote_federation,
    train_requests,
)

DEADLINE = 30.0
CONDUCT = RunSettings(evaluation=QUIET, cohort=1, faults=Faults(deadline=DEADLINE))


def only(client, what):
    """Return trouble with the replies to one client; those of others arrive as they are."""

    def trouble(message, payload):
        if message.kind != "train":
            return payload
        request = read_train_request(message.payload)
        return what(request, payload) if request.task.client == client else payload

    return trouble


def changed(request, payload, **fields):
    """Return an answer with other fields."""
    sent = request.task.assignment
    answer = read_train_result(payload, SizeLimits.of(sent, 10), sent)
    return write_train_result(replace(answer, **fields), sent)


def rounds(channel, count=1, settings=CONDUCT, **rest):
    with remote_federation(channel, settings=settings, **rest) as made:
        return list(made.rounds(count))


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        (lambda *_: NoReply("error 5: Node Unavailable"), "lost", "Node Unavailable"),
        (lambda _, payload: After(payload, None), "late", "no answer within 30 s"),
        (lambda _, payload: payload[: len(payload) // 2], "invalid", "packet"),
        (lambda *_: b"", "invalid", "packet"),
        (lambda o, p: changed(o, p, client="c0"), "invalid", "it answers as client 'c0'"),
        (lambda o, p: changed(o, p, client="c9"), "invalid", "it answers as client 'c9'"),
        (lambda o, p: changed(o, p, round=7), "invalid", "answers round 7, attempt 0"),
        (lambda o, p: changed(o, p, attempt=1), "invalid", "answers round 1, attempt 1"),
        (lambda o, p: changed(o, p, assignment="0" * 64), "invalid", "other factors than were"),
        (lambda o, p: changed(o, p, examples=0), "invalid", "at least 1 training example"),
    ],
)
def test_an_answer_that_cannot_be_used_costs_its_client_alone(what, kind, reason):
    channel = channel_to_each()
    channel.trouble = only("c1", what)
    (record,) = rounds(channel)
    assert list(record.rejected) == ["c1"]
    assert reason in record.rejected["c1"]
    assert [(one["client"], one["kind"]) for one in record.turned_away] == [("c1", kind)]
    undisturbed = channel_to_each()
    undisturbed.trouble = only("c1", lambda *_: NoReply("gone"))
    assert rounds(undisturbed)[0].energy == record.energy, "the others' updates alone"


def test_a_machine_that_cannot_be_reached_is_lost_and_told_of():
    channel, told = channel_to_each(), []
    with remote_federation(channel, settings=CONDUCT, tell=told.append) as made:
        channel.unreachable.add(2)
        (record,) = made.rounds(1)
    assert record.rejected == {"c1": "its machine cannot be reached"}
    assert [one["kind"] for one in record.turned_away] == ["lost"]
    assert "c1: its machine cannot be reached" in told


def test_a_late_answer_is_counted_as_stale_in_the_next_round_and_not_aggregated():
    channel = channel_to_each()
    channel.trouble = only("c1", lambda o, p: After(p, DEADLINE + 1) if o.task.round == 1 else p)
    told = []
    first, second, third = rounds(channel, 3, tell=told.append)
    assert first.rejected == {"c1": "no answer within 30 s"}
    assert [one["kind"] for one in first.turned_away] == ["late"]
    late = next(line for line in told if "too late" in line)
    assert late == "c1: an answer to round 1 came too late"
    stale = second.turned_away + third.turned_away
    assert [(one["client"], one["kind"]) for one in stale] == [("c1", "stale")]
    assert second.rejected == third.rejected == {}
    assert second.traffic["c1"]["up"] == 2 * third.traffic["c1"]["up"], "it travelled all the same"
    never = channel_to_each()
    never.trouble = only("c1", lambda o, p: NoReply("gone") if o.task.round == 1 else p)
    assert rounds(never, 2)[1].energy == second.energy


def test_what_had_come_by_the_deadline_is_taken_however_long_it_took_to_ask():
    channel = channel_to_each()

    def slow(message, payload):
        channel.clock.now += DEADLINE
        return payload

    channel.trouble = slow
    (record,) = rounds(channel)
    assert record.rejected == {}


def test_who_was_late_long_ago_is_not_waited_for_for_ever():
    channel = channel_to_each()
    channel.trouble = only("c1", lambda _, payload: After(payload, None))
    seen = []
    receive = channel.receive
    channel.receive = lambda message_ids: (seen.append(len(message_ids)), receive(message_ids))[1]
    with remote_federation(channel, settings=CONDUCT) as made:
        list(made.rounds(12))
        late = made.engine._late
    assert max(seen) <= 4 + 3, "four that are asked and the late ones of three deadlines"
    assert all(not one.task.assignment.merged and not one.own.merged for one in late.values())


def test_a_late_one_does_not_hold_what_was_merged_into_the_base():
    channel = channel_to_each()
    channel.trouble = only("c1", lambda _, payload: After(payload, None))
    with remote_federation(channel, settings=CONDUCT, rule=FLoRA()) as made:
        list(made.rounds(3))
        late = made.engine._late
    assert late
    for one in late.values():
        assert not one.task.assignment.merged
        assert not one.own.merged


def test_a_request_is_made_when_it_is_sent(monkeypatch):
    """Requests are as large as assignments: those of a round are never all in memory."""
    channel, had, real = channel_to_each(), [], engine.write_train_request

    def write(request):
        had.append(len(train_requests(channel)))
        return real(request)

    monkeypatch.setattr(engine, "write_train_request", write)
    rounds(channel)
    assert had == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (ClientPolicy(largest_rank=2), "limits.largest_rank = 2, and it was sent rank 3"),
        (
            ClientPolicy(smallest_count=7),
            "limits.smallest_count = 7, and it has fewer training examples",
        ),
    ],
)
def test_a_client_that_refuses_is_in_the_record_with_its_reason(policy, reason):
    channel = channel_to_each()
    with remote_federation(channel, settings=CONDUCT) as made:
        channel.machines[2] = machine(["c1"], policy=policy)
        (record,) = made.rounds(1)
        summary = made.finish()
    assert reason in record.rejected["c1"]
    assert [(one["client"], one["kind"]) for one in record.turned_away] == [("c1", "refused")]
    assert summary["clients"]["c1"]["refused"] == 1
    assert summary["clients"]["c1"]["rounds_joined"] == 0


def test_the_text_of_a_foreign_error_does_not_travel(monkeypatch):
    real = engines.train_cohort

    def train(model, jobs, on_step):
        if jobs[0].client == "c1":
            raise ValueError("SECRET sentence of a patient")
        return real(model, jobs, on_step)

    monkeypatch.setattr(engines, "train_cohort", train)
    channel, seen = channel_to_each(), []
    channel.trouble = lambda _, payload: (seen.append(payload), payload)[1]
    (record,) = rounds(channel)
    assert record.rejected["c1"] == "ValueError on the client's machine; see its own log"
    assert not any(b"SECRET" in payload for payload in seen)


def test_a_client_ends_its_training_itself_at_the_deadline(monkeypatch):
    passed = iter([0.0, 0.0, DEADLINE, DEADLINE + 1])
    monkeypatch.setattr(client.time, "monotonic", lambda: next(passed, 1000.0))
    node = machine(["c0"])
    reachable = Reachable.by(MemoryChannel({1: node}, clock=Clock()))
    engine = reachable.engine(one_block(), deadline=DEADLINE)
    (answer,) = ask(engine, ["c0"])
    assert isinstance(answer, Failure)
    assert (answer.kind, answer.reason) == ("late", "its deadline passed while it was training")


# --- quorum, attempts, resuming ---


def test_below_quorum_the_state_stays_and_other_clients_are_tried():
    run_settings = replace(CONDUCT, faults=replace(CONDUCT.faults, quorum=1.0))
    channel = channel_to_each()
    channel.trouble = only(
        "c1", lambda o, p: NoReply("gone for a moment") if o.task.attempt == 0 else p
    )
    (record,) = rounds(channel, settings=run_settings)
    assert record.attempt == 1
    assert record.abandoned == [{"c1": "gone for a moment"}]
    assert record.rejected == {}


def test_a_round_that_fails_names_every_reason_and_leaves_the_state(tmp_path):
    channel = channel_to_each()
    channel.trouble = lambda message, p: NoReply("cable cut") if message.kind == "train" else p
    with remote_federation(channel, tmp_path / "run", settings=CONDUCT) as made:
        before = made.adapter.factors.hash()
        with pytest.raises(RoundFailedError, match=r"(?s)round 1: fewer than 50%.*c0: cable cut"):
            list(made.rounds(1))
        assert made.adapter.factors.hash() == before
        assert made.round == 0
    assert len(train_requests(channel)) == 3 * 4, "three attempts"


class Killed(BaseException):
    """As sudden as a signal."""


def killed_after_two_answers(folder):
    """Carry a round out until two of its four answers are saved."""
    channel, looks = MemoryChannel(machines(), clock=Clock(), singly=True), []

    def stop():
        if len(train_requests(channel)) == 4:
            looks.append(1)
        if len(looks) == 3:  # One look finds one answer.
            raise Killed
        return False

    with remote_federation(channel, folder, settings=CONDUCT, stop=stop) as made:
        list(made.rounds(1))


def test_after_a_kill_only_the_missing_clients_are_asked(tmp_path):
    """What was saved is read; the round ends with the bytes of one that was not disturbed."""
    with opened(settings=CONDUCT) as undisturbed:
        list(undisturbed.rounds(1))
        expected = undisturbed.adapter.factors.hash()
    with pytest.raises(Killed):
        killed_after_two_answers(tmp_path / "run")
    again = channel_to_each()
    with remote_federation(again, tmp_path / "run", settings=CONDUCT, resume=True) as made:
        (record,) = made.rounds(1)
        assert made.adapter.factors.hash() == expected
    assert [request.task.client for request in train_requests(again)] == [
        "c2",
        "c3",
    ]
    assert record.rejected == {}


# --- split clients ---


class RecordingSplitServer:
    """A split server that trains nothing: what was asked of it; `lose` are lost at it."""

    def __init__(self, access="it is not there", lose=()):
        self.access, self.lose = access, lose
        self.asked: list[tuple[str, object]] = []

    def open(self, work):
        jobs = work.jobs
        self.asked.append(("open", [job.client for job in jobs]))
        if self.access is None:
            raise SplitServerError("the split server cannot start: no such model")
        if isinstance(self.access, str):
            return {job.client: self.access for job in jobs}
        return {job.client: replace(self.access, client=job.client) for job in jobs}

    def of(self, what):
        return [client for asked, client in self.asked if asked == what]

    def collect(self, client):
        self.asked.append(("collect", client))
        if client in self.lose:
            raise SplitServerError(f"client {client!r}: the split server has died")
        return ServerPartResult(Adapter({}))

    def status(self):
        return {}

    def leave(self, client):
        self.asked.append(("leave", client))

    def close(self):
        self.asked.append(("close", None))

    def stop(self):
        self.asked.append(("stop", None))


SPLIT = replace(CONDUCT, split=SplitSettings(wire="float32"))
CUT = Fleet.table(
    {"c0": "cut", "c1": "cut", "c2": "whole", "c3": "whole"},
    types={name: LoRAType(name, {"all": 2}) for name in ("cut", "whole")},
    cuts={"cut": CutPoint(1)},
)


def two_blocks():
    return tiny_loaded("llama", num_hidden_layers=2, sites=SITES)


def split_rounds(server, trained=lambda *_: None, settings=SPLIT, unreachable=(), **rest):
    """Return the first round's record; a cut client's own half trains without a server."""
    model, channel = two_blocks(), channel_to_each(model=two_blocks())
    for node in channel.machines.values():
        node._train_client_part = lambda request: trained(request) or half(request)
    with remote_federation(
        channel, model=model, settings=settings, split_server=server, fleet=CUT, **rest
    ) as made:
        channel.unreachable |= set(unreachable)
        return next(made.rounds(1))


def half(request):
    """Return an update of a cut client's own sites, as they were sent."""
    task = request.task
    return Update(
        client=task.client,
        round=task.round,
        attempt=task.attempt,
        assignment=request.assignment,
        examples=5,
        adapter=task.assignment.start,
        metrics={"loss": 1.0, "tokens": 5.0, "target_tokens": 5.0},
    )


ACCESS = Credentials(
    "127.0.0.1:1",
    new_identity(["127.0.0.1"]).certificate,
    *("run", 1, 0, "c0"),
    b"0" * 32,
    FrameLimits(64, 16, codec("float32")),
    5.0,
)


@pytest.mark.parametrize("adapters", ["own", "shared"])
def test_a_split_client_whose_tail_is_lost_is_lost_and_the_others_go_on(adapters):
    server = RecordingSplitServer(ACCESS, lose=("c0", "c1"))
    run_settings = replace(SPLIT, split=SplitSettings(wire="float32", adapters=adapters))
    record = split_rounds(server, settings=run_settings)
    assert set(record.rejected) == {"c0", "c1"}
    assert record.rejected["c0"] == "client 'c0': the split server has died"
    assert [one["kind"] for one in record.turned_away] == ["lost", "lost"]
    assert sorted(server.of("leave")) == ["c0", "c1"]
    assert server.asked[-2:] == [("close", None), ("stop", None)]


def test_what_one_adapter_for_all_learned_is_collected_when_nobody_is_at_work():
    server = RecordingSplitServer(ACCESS)
    run_settings = replace(SPLIT, split=SplitSettings(wire="float32", adapters="shared"))

    def trained(request):
        if request.task.client == "c1":
            return Failure("c1", request.task.round, request.task.attempt, "it has diverged")
        return None

    split_rounds(server, trained, run_settings)
    told = [what for what, client in server.asked if client in ("c0", "c1")]
    assert told == ["leave", "collect"], "first the one that will not come, then the one that did"


@pytest.mark.parametrize(
    ("trained", "unreachable", "reason"),
    [
        (lambda request: Failure("c0", 1, 0, "no memory"), (), "no memory"),
        (lambda request: replace(half(request), round=9), (), "answers round 9"),
        (lambda request: None, (1,), "its machine cannot be reached"),
    ],
)
def test_the_tail_of_a_client_without_a_usable_answer_is_left(trained, unreachable, reason):
    """Others that train beside it may wait for its frames."""
    server = RecordingSplitServer(ACCESS)
    record = split_rounds(
        server, lambda o: trained(o) if o.task.client == "c0" else None, SPLIT, unreachable
    )
    assert reason in record.rejected["c0"]
    assert "c0" in server.of("leave")
    assert "c0" not in server.of("collect")


def test_a_split_server_that_gives_no_way_in_is_the_reason_of_its_clients():
    server = RecordingSplitServer("no tail was made: no memory")
    record = split_rounds(server)
    assert record.rejected == dict.fromkeys(("c0", "c1"), "no tail was made: no memory")
    assert record.traffic["c0"]["up"] == 0


def test_a_split_server_that_cannot_start_ends_the_run():
    server = RecordingSplitServer(None)
    with pytest.raises(SplitServerError, match="no such model"):
        split_rounds(server)
    assert server.asked[-2:] == [("close", None), ("stop", None)]


def test_without_a_split_server_nobody_can_be_cut():
    with pytest.raises(SplitServerError, match="there is no split server"):
        split_rounds(None)


def test_a_request_to_a_split_client_has_its_own_sites_and_the_hash_of_all():
    server, seen = RecordingSplitServer(ACCESS), {}
    split_rounds(server, lambda request: seen.update({request.task.client: request}))
    own = seen["c0"].task.assignment
    assert own.start
    assert all("layers.0." in site for site in own.start)
    assert seen["c0"].assignment == seen["c1"].assignment != own.hash()


@pytest.mark.parametrize(
    ("policy", "cut", "reason"),
    [
        (
            ClientPolicy(lowest_cut=2),
            CutPoint(1),
            "limits.lowest_cut = 2, and its model is cut at 1",
        ),
        (ClientPolicy(labels_may_leave=False), CutPoint(1), "limits.labels_may_leave = false"),
        (
            ClientPolicy(labels_may_leave=False, lowest_cut=1),
            CutPoint(1, 2),
            "it has no way to its tail",
        ),
    ],
)
def test_a_split_client_refuses_a_cut_beyond_its_policy(policy, cut, reason):
    model = tiny_loaded("llama", num_hidden_layers=3, sites=SITES)
    reachable = Reachable.by(
        MemoryChannel({1: machine(["c0"], model=model, policy=policy)}, clock=Clock())
    )
    engine = reachable.engine(model, split_server=WithoutCredentials(None))
    (answer,) = ask(engine, ["c0"], cuts={"one": cut})
    assert isinstance(answer, Failure)
    assert reason in answer.reason
    assert answer.kind == ("failed" if "no way" in reason else "refused")


@pytest.mark.parametrize(
    "limits",
    [
        FrameLimits(10**6, 16, codec("float32")),
        FrameLimits(8, 32, codec("float32")),
        FrameLimits(8, 16, codec("bf16")),
    ],
)
def test_a_split_client_opens_no_stream_for_larger_frames_than_its_own_work_makes(limits):
    model = tiny_loaded("llama", num_hidden_layers=3, sites=SITES)
    assert model.spec.hidden == 16
    reachable = Reachable.by(MemoryChannel({1: machine(["c0"], model=model)}, clock=Clock()))
    engine = reachable.engine(
        model, split_server=RecordingSplitServer(replace(ACCESS, limits=limits))
    )
    (answer,) = ask(engine, ["c0"], cuts={"one": CutPoint(1)})
    assert isinstance(answer, Failure)
    assert "expected frames of 16 numbers a token in float32" in answer.reason
    assert "server and client read other recipes" in answer.reason


class WithoutCredentials(RecordingSplitServer):
    """A split server that gives no credentials; its clients are asked all the same."""

    def open(self, *_):
        return {}
