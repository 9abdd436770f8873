"""What a client's machine answers: counts, scores and updates, and nothing else of its data."""

from dataclasses import replace

import pytest

from federations import MEASURED, clients, one_block
from polyrank.data.types import Example
from polyrank.errors import PacketError
from polyrank.evaluation import Evaluation
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.protocol.client_info import ClientPolicy, Counts, read_node_info
from polyrank.protocol.evaluate import EvaluateRequest, read_client_metrics, write_evaluate_request
from remote_federations import Reachable, ask, channel_to_each, machine

WORDS = clients()


def asked(node, *queries):
    request = EvaluateRequest(queries)
    return read_client_metrics(node.answer("evaluate", write_evaluate_request(request)), request)


def test_a_node_tells_counts_and_versions_and_no_word_of_the_data():
    data = clients()
    told = "xylophone"
    train = tuple(replace(one, input=f"{told} {one.input}") for one in data["c0"].train)
    data["c0"] = replace(data["c0"], train=train)
    payload = machine(["c0", "u0"], data).answer("hello", b"")
    info = read_node_info(payload)
    assert told.encode() not in payload
    assert not any(word in payload for word in (b" w4", b"w5 "))
    first, held_out = info.clients
    assert (first.name, first.seen, held_out.name, held_out.seen) == ("c0", True, "u0", False)
    assert first.counts["train"].rows == 5
    assert held_out.counts["train"] == Counts(0, 0, 0)
    assert held_out.counts["test"].rows == 7, "a held-out client's training examples are scored"
    assert {"torch", "model"} <= info.versions.keys()


def test_other_data_has_another_fingerprint_and_the_same_has_the_same():
    def mark(data):
        return read_node_info(machine(["c0"], data).answer("hello", b"")).clients[0].fingerprint

    changed = clients()
    (first, *rest) = changed["c0"].test
    changed["c0"] = replace(
        changed["c0"], test=(Example(first.input, ("w9 w9",), first.row), *rest)
    )
    assert mark(clients()) == mark(clients()) != mark(changed)


def test_parts_with_too_few_examples_are_not_counted_and_too_few_to_train_is_a_refusal():
    policy = ClientPolicy(smallest_count=3)
    (one,) = read_node_info(machine(["c0"], policy=policy).answer("hello", b"")).clients
    assert [one.counts[part].rows for part in ("train", "validation", "test")] == [5, 0, 0]
    info = read_node_info(
        machine(["c0"], policy=ClientPolicy(smallest_count=6)).answer("hello", b"")
    )
    assert info.clients == ()
    assert "limits.smallest_count = 6" in info.refusal
    assert "5" not in info.refusal, "how few there are is not told"


@pytest.mark.parametrize(
    ("evaluation", "smallest", "loss", "texts"),
    [
        (MEASURED, 0, True, True),
        (MEASURED, 1, True, True),
        (MEASURED, 2, True, False),  # One text is generated, losses are of two examples.
        (MEASURED, 3, False, False),
        (Evaluation(examples=0, generate=2, max_new_tokens=2), 2, True, True),
        (Evaluation(examples=1, generate=2, max_new_tokens=2), 2, False, False),
    ],
)
def test_a_score_stands_on_as_many_examples_as_the_owner_wants(evaluation, smallest, loss, texts):
    node = machine(["c0"], evaluation=evaluation, policy=ClientPolicy(smallest_count=smallest))
    (metrics,) = asked(node, EvaluateQuery(None, ("c0",), "test", True))
    assert bool(metrics.clients) == loss
    if loss:
        assert (metrics.clients["c0"]["exact_match"] is not None) == texts


def test_clients_that_are_not_here_are_not_scored():
    (metrics,) = asked(machine(["c0"]), EvaluateQuery(None, ("c0", "c1"), "test"))
    assert list(metrics.clients) == ["c0"]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_what_is_no_packet_is_an_error_that_says_so(kind):
    with pytest.raises(PacketError):
        machine(["c0"]).answer(kind, b"no packet")


def test_a_request_for_a_client_that_is_elsewhere_fails():
    channel = channel_to_each()
    engine = Reachable.by(channel).engine(one_block())
    channel.machines[2] = machine(["c3"])
    (answer,) = ask(engine, ["c1"])
    assert answer.kind == "failed"
    assert answer.reason == "client 'c1': it is not on this machine; here is ['c3']"
