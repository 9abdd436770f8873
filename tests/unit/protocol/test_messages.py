"""Messages between server and clients are read as they were written, bit by bit."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

import packet_samples as samples
from polyrank.aggregation import FFA, RULES, TRAINED, FlexLoRA, FLoRA, HetLoRA, SLoRA
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import PacketError
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.planning import CutPoint
from polyrank.protocol.client_info import read_node_info, write_node_info
from polyrank.protocol.evaluate import (
    EvaluateRequest,
    read_client_metrics,
    read_evaluate_request,
    write_client_metrics,
    write_evaluate_request,
)
from polyrank.protocol.size_limits import SizeLimits
from polyrank.protocol.train_request import TrainRequest, read_train_request, write_train_request
from polyrank.protocol.train_result import read_train_result, write_train_result
from polyrank.rounds.messages import Failure, TrainTask
from polyrank.rounds.round import Round
from rules import named

EVERY = [*RULES.values(), SLoRA(FlexLoRA(), 2), SLoRA(HetLoRA(), 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def same(one, other):
    """Whether two requests or results are alike in everything, tensors bit by bit."""
    if isinstance(one, TrainRequest):
        sent, came = one.task.assignment, other.task.assignment
        assert replace(one, task=None) == replace(other, task=None)
        assert replace(one.task, assignment=None) == replace(other.task, assignment=None)
        for name in ("start", "frozen", "merged"):
            assert getattr(sent, name).hash() == getattr(came, name).hash(), name
        assert {s: x.hex() for s, x in sent.scale.items()} == {
            s: x.hex() for s, x in came.scale.items()
        }
        assert (sent.train, sent.penalty) == (came.train, came.penalty)
        assert sent.hash() == came.hash()
    else:
        assert replace(one, adapter=None) == replace(other, adapter=None)
        assert list(one.metrics) == list(other.metrics)
        assert one.adapter.hash() == other.adapter.hash()


def travelled(data):
    """The bytes of a packet's tensors."""
    return len(samples.opened(data)[2])


@pytest.mark.parametrize("held", [None, {"block.0.q", "block.0.down"}, set()])
@pytest.mark.parametrize("rule", EVERY, ids=named)
def test_requests_and_results_of_every_rule_are_exact_on_either_side_of_a_cut(rule, held):
    for round, client in samples.assignments(rule, equal=not rule.mixed_ranks):
        task, cut = round.task(client), None
        if held is not None:
            task, cut = replace(task, assignment=task.assignment.only(held)), CutPoint(1, 2)
        whole = round.assignment_hash(client)
        request = TrainRequest(replace(task, cut=cut), whole, 3, "paper", 1.5)
        same(request, came := read_train_request(write_train_request(request)))

        sent = task.assignment
        update = samples.update_to(came.task.assignment, client, round.number, whole)
        for asked in (None, sent):
            data = write_train_result(update, asked)
            same(update, read_train_result(data, SizeLimits.of(sent), asked))
        assert travelled(data) == sent.travelling(update.adapter)
        if held is None:
            again = Round(round.settings, round.state, round.number, 0, round.clients)
            again.accept(read_train_result(data, SizeLimits.of(sent), sent))
            assert again.rejected == {}


def test_a_fixed_factor_does_not_travel_back_whichever_it_is(monkeypatch):
    monkeypatch.setitem(TRAINED, "a", ("a",))
    for train in TRAINED:
        sent = replace(samples.assignment(), train=train, penalty=None)
        request = TrainRequest(TrainTask("c", 1, 0, 2, sent), sent.hash(), 0, "channel", 1.0)
        came = read_train_request(write_train_request(request)).task.assignment
        assert came.hash() == sent.hash()
        data = write_train_result(update := samples.update_to(came, whole=sent.hash()), came)
        same(update, read_train_result(data, SizeLimits.of(sent), sent))
        assert travelled(data) == sent.travelling(update.adapter)


def test_a_frozen_term_that_is_the_negative_of_the_start_does_not_travel():
    met = 0
    for round, client in samples.assignments(FLoRA(reinitialise=False)):
        sent = round.assignment(client)
        request = TrainRequest(round.task(client), sent.hash(), 0, "channel", 1.0)
        assert travelled(write_train_request(request)) == sent.nbytes + sent.merged.nbytes
        met += len(sent.frozen)
    assert met


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_keep_their_sign_in_a_frozen_term(zero):
    start = LowRank(torch.tensor([[0.0], [1.0]]), torch.ones(1, 2))
    frozen = LowRank(torch.tensor([[zero], [-1.0]]), start.a)
    sent = replace(samples.assignment(), merged=Adapter({}), penalty=None)
    sent = replace(
        sent, start=Adapter({"s": start}), frozen=Adapter({"s": frozen}), scale={"s": 1.0}
    )
    request = TrainRequest(TrainTask("c", 1, 0, 1, sent), sent.hash(), 0, "channel", 1.0)
    came = read_train_request(write_train_request(request)).task.assignment.frozen["s"].b
    assert math.copysign(1, came[0, 0]) == math.copysign(1, zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype):
    odd = torch.tensor([[math.nan, math.inf], [-0.0, 1e-7]]).to(dtype)
    adapter = Adapter({"one": LowRank(odd, odd.T), "two": Dense(odd)})
    came = read_evaluate_request(
        write_evaluate_request(EvaluateRequest((EvaluateQuery(adapter, ("c",), "test"),)))
    )
    assert came.queries[0].adapter.hash() == adapter.hash()


def test_views_and_tensors_that_share_memory_are_written_as_they_look():
    whole = samples.low_rank(6, 5, 4)
    adapter = Adapter({"a": whole.prefix(2), "b": whole.prefix(1), "c": whole.T, "d": whole})
    (came,) = read_evaluate_request(
        write_evaluate_request(EvaluateRequest((EvaluateQuery(adapter, (), "test"),)))
    ).queries
    assert came.adapter.hash() == adapter.hash()
    assert all(t.is_contiguous() for d in came.adapter.values() for t in d.tensors().values())


def test_axes_of_length_one_may_have_any_stride():
    one = torch.tensor([3.0, 4.0, 5.0])
    adapter = Adapter(
        {"s": LowRank(one.as_strided((1, 1), (5, 7), 1), one.as_strided((1, 3), (9, 1)))}
    )
    (came,) = read_evaluate_request(
        write_evaluate_request(EvaluateRequest((EvaluateQuery(adapter, (), "test"),)))
    ).queries
    assert came.adapter.hash() == adapter.hash()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_read_shares_no_memory_with_the_bytes(kind):
    request = samples.train_request()
    raw = bytearray(write_train_request(request))
    came = read_train_request(kind(raw))
    raw[-200:] = bytes(200)
    same(request, came)


def test_a_packet_is_a_safetensors_file():
    request = samples.train_request()
    tensors = load(write_train_request(request))
    start = request.task.assignment.start
    assert torch.equal(tensors["start|block.0.q|a"], start["block.0.q"].a)
    assert torch.equal(tensors["start|block.0.k|b"], start["block.0.k"].b)
    assert tensors["start|block.0.v|b"].shape == (3, 0)
    assert "frozen|block.0.q|b" not in tensors


def test_a_request_to_a_split_client_has_its_credentials():
    access = pytest.importorskip("polyrank.transport.remote").Credentials
    from polyrank.codecs import codec
    from polyrank.transport import FrameLimits

    pem = b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"
    way = access(
        "host:1234", pem, "run", 3, 1, "c0", b"t" * 32, FrameLimits(8, 4, codec("bf16")), 9.5
    )
    request = replace(samples.train_request(CutPoint(1, 3)), access=way)
    data = write_train_request(request)
    same(request, read_train_request(data))
    wrong = {
        "client": "c1",
        "round": 4,
        "attempt": 0,
        "token": "AA==",
        "patience": None,
        "address": [],
        "certificate": "x",
        "run": 7,
        "wire": {},
    }
    for name, value in wrong.items():
        bad = samples.with_fields(data, lambda f, n=name, v=value: f["access"].update({n: v}))
        with pytest.raises(PacketError, match=f"train request packet, access.*{name}"):
            read_train_request(bad)
    bad = samples.with_fields(data, lambda f: f.update(access=[1]))
    with pytest.raises(PacketError, match="access: expected a table"):
        read_train_request(bad)


@pytest.mark.parametrize("reason", ["", "it diverged: ü", "long " * 2000, "\ud800 alone"])
def test_failures_come_through_with_reasons_of_bounded_length(reason):
    failure = Failure("c0", 2, 1, reason, {"wire_up": 10, "wire_down": math.nan})
    came = read_train_result(write_train_result(failure), SizeLimits.of(samples.assignment()))
    assert (came.client, came.round, came.attempt) == ("c0", 2, 1)
    assert came.reason.encode() == reason.encode("utf-8", "replace")[:4096]
    assert came.metrics["wire_up"] == 10
    assert math.isnan(came.metrics["wire_down"])


@pytest.mark.parametrize("kind", ["failed", "late", "refused"])
def test_failures_keep_their_kind(kind):
    failure = Failure("c0", 2, 1, "why", kind=kind)
    assert (
        read_train_result(write_train_result(failure), SizeLimits.of(samples.assignment()))
        == failure
    )


def test_metrics_that_are_not_finite_travel_to_be_judged():
    sent = samples.assignment()
    update = replace(
        samples.update_to(sent), metrics={"a": math.inf, "b": -math.inf, "c": 5e-324, "d": 7}
    )
    same(update, came := read_train_result(write_train_result(update), SizeLimits.of(sent)))
    assert isinstance(came.metrics["d"], int)


def test_only_what_was_trained_is_taken_from_an_answer():
    """A of the update is the server's own copy, so a client cannot change it."""
    for round, client in samples.assignments(FFA()):
        sent, update = round.assignment(client), samples.trained(round, client)
        came = read_train_result(write_train_result(update, sent), SizeLimits.of(sent), sent)
        assert all(came.adapter[s].a.data_ptr() == sent.start[s].a.data_ptr() for s in sent.start)
        other = {s: LowRank(d.b, d.a + 1) for s, d in update.adapter.items()}
        with pytest.raises(PacketError, match=r"'block\.0\.down': expected a as it was sent"):
            write_train_result(replace(update, adapter=Adapter(other)), sent)


def test_an_update_may_be_of_a_wider_dtype_than_was_sent():
    sent = samples.assignment()
    update = samples.update_to(sent)
    update = replace(update, adapter=update.adapter.to(dtype=torch.float64))
    same(update, read_train_result(write_train_result(update, sent), SizeLimits.of(sent), sent))


def test_node_infos_evaluate_requests_and_metrics_come_through():
    info = samples.node_info()
    assert read_node_info(write_node_info(info)) == info
    refusing = replace(info, clients=(), device=None, refusal="no data: ü")
    assert read_node_info(write_node_info(refusing)) == refusing
    request = samples.evaluate_request()
    came = read_evaluate_request(write_evaluate_request(request))
    for one, other in zip(request.queries, came.queries, strict=True):
        assert replace(one, adapter=None) == replace(other, adapter=None)
        assert (one.adapter is None) == (other.adapter is None)
        if one.adapter is not None:
            assert one.adapter.hash() == other.adapter.hash()
    for asked in (None, request):
        assert read_client_metrics(write_client_metrics(samples.client_metrics()), asked) == tuple(
            samples.client_metrics()
        )
    assert read_train_request(
        write_train_request(samples.train_request(CutPoint(2)))
    ).task.cut == CutPoint(2)


def test_an_adapter_that_is_asked_about_twice_travels_once():
    request = samples.evaluate_request()
    once = EvaluateRequest(request.queries[:3])
    assert travelled(write_evaluate_request(request)) == travelled(write_evaluate_request(once))
    came = read_evaluate_request(write_evaluate_request(request)).queries
    assert came[0].adapter is came[3].adapter


def test_scores_that_are_not_finite_are_null():
    (first, *rest) = samples.client_metrics()
    scores = {"loss": math.nan, "exact_match": None, "rouge_l": None}
    came = read_client_metrics(
        write_client_metrics([replace(first, clients={"c0": scores}), *rest])
    )
    assert came[0].clients["c0"]["loss"] is None


def test_the_header_is_small_beside_an_adapter_of_some_megabytes():
    """200 sites of rank 4 at 1024×1024, 6.6 MB: below 1%."""
    delta = samples.low_rank(1024, 1024, 4)
    start = Adapter(
        {f"model.layers.{i}.self_attn.{n}_proj": delta for i in range(50) for n in "qkvo"}
    )
    sent = replace(
        samples.assignment(),
        start=start,
        scale=dict.fromkeys(start, 2 / 3),
        frozen=Adapter({}),
        merged=Adapter({}),
        penalty=None,
    )
    request = write_train_request(
        TrainRequest(TrainTask("c", 1, 0, 1, sent), sent.hash(), 0, "channel", 1.0)
    )
    answer = write_train_result(samples.update_to(sent), sent)
    for data in (request, answer):
        assert len(data) - start.nbytes < 0.01 * start.nbytes


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (
            lambda: write_train_request(replace(samples.train_request(), seconds=math.nan)),
            "train request packet.*finite",
        ),
        (
            lambda: write_train_request(replace(samples.train_request(), seconds=1e12)),
            "faults.deadline.*finite",
        ),
        (
            lambda: write_train_request(replace(samples.train_request(), metric="\ud800")),
            "train request packet.*UTF-8",
        ),
        (
            lambda: write_train_request(
                replace(
                    samples.train_request(),
                    task=replace(
                        samples.train_request().task,
                        assignment=replace(samples.assignment(), scale={"block.0.q": 1.0}),
                    ),
                )
            ),
            "train request packet, scale",
        ),
        (
            lambda: write_evaluate_request(
                EvaluateRequest(
                    (EvaluateQuery(Adapter({"s": Dense(torch.ones(1, 1).bool())}), (), "test"),)
                )
            ),
            "evaluate request packet, tensor.*torch.bool",
        ),
        (
            lambda: write_node_info(
                replace(
                    samples.node_info(),
                    clients=(replace(samples.node_info().clients[0], counts={}),),
                )
            ),
            "registration packet, client 'c0', counts",
        ),
        (
            lambda: write_client_metrics(
                [replace(samples.client_metrics()[0], clients={"c": {"loss": 1.0}})]
            ),
            "client metrics packet, client 'c'",
        ),
        (
            lambda: write_train_result(
                replace(samples.update_to(samples.assignment()), adapter=Adapter({})),
                samples.assignment(),
            ),
            "train result packet: expected the sites that were sent",
        ),
        (
            lambda: write_train_result(
                replace(
                    samples.update_to(sent := samples.assignment()),
                    adapter=Adapter(
                        {
                            **sent.start,
                            "block.1.q": Sparse(torch.ones(3), torch.tensor([1, 2, 3]), (6, 5)),
                        }
                    ),
                ),
                sent,
            ),
            "'block.1.q': expected positions as it was sent",
        ),
    ],
)
def test_what_no_packet_can_hold_is_refused_before_it_is_sent(write, match):
    with pytest.raises(PacketError, match=match):
        write()


def test_reasons_are_read_as_they_can_be_shown():
    """A terminal obeys control characters, and these come from elsewhere."""
    reason, shown = "no\x1b[2J\xa0room\u202e\nline", "no\ufffd[2J\xa0room\ufffd\nline"
    answer = read_train_result(
        write_train_result(Failure("a", 1, 0, reason)), SizeLimits(2**20, 2**20, 0)
    )
    assert answer.reason == shown
    assert (
        read_node_info(write_node_info(replace(samples.node_info(), refusal=reason))).refusal
        == shown
    )
