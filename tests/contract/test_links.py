"""What every link must give, whatever carries it: in process, or over gRPC and TLS.

A new link needs a class like `InProcess` here, in `LINKS`.
"""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from polyrank.codecs import CODECS, codec
from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.training.split import (
    Activations,
    Gradients,
    Refused,
    RequestId,
    Returned,
    Step,
    Stepped,
)
from polyrank.transport import (
    FrameLimits,
    InProcessLink,
    InProcessLinks,
    ServingSettings,
    encode,
)
from polyrank.transport.remote import GrpcLink, SplitServer, new_identity

D = 6
TOKENS = 8
CLIENTS = ("a", "b", "c")
SOON = 60  # seconds until a test gives up; nothing is measured by it


class Doubling:
    """A server part that doubles states, records requests, and applies nothing twice."""

    def __init__(self):
        self.seen, self.applied, self.left, self.together = [], [], [], []
        self._answers = {}

    def answer(self, requests):
        self.seen += requests
        self.together.append([request.id.client for request in requests])
        return [self._one(request) for request in requests]

    def _one(self, request):
        key = (type(request), request.id)
        if request.id.step == 13:
            return Refused(request.id, "there is no step 13")
        if request.id.step == 14:
            return Returned(request.id, request.states * torch.inf)
        if key not in self._answers:
            self.applied.append(request)
            if isinstance(request, Step):
                self._answers[key] = Stepped(request.id)
            else:
                loss = float(request.states.sum()) if isinstance(request, Activations) else None
                self._answers[key] = Returned(request.id, request.states * 2, loss, 4.0)
        return self._answers[key]

    def leave(self, client):
        self.left.append(client)


class Wrong(Doubling):
    """A server part that answers what was not asked, as each step says."""

    def _one(self, request):
        states = torch.ones(3, D)
        return {
            0: Returned(replace(request.id, micro=7), states),
            1: Stepped(request.id),
            2: Returned(request.id, states[:2]),
            3: Returned(request.id, states),
        }[request.id.step]


class InProcess:
    """Links within this process."""

    def __init__(self, server_part, limits):
        self.server_part, self._limits = server_part, limits
        self._links = InProcessLinks(server_part, limits.codec.name, limits.width, limits.tokens)

    def link(self, client, wire=None):
        return InProcessLink(self._links, client, with_wire(self._limits, wire))

    def end(self):
        """Nothing but links was opened."""


class Grpc:
    """Links over gRPC and TLS, through the machine's own network."""

    def __init__(self, server_part, limits):
        self.server_part = server_part
        identity = new_identity(["127.0.0.1"])
        self._server = SplitServer("127.0.0.1:0", identity, "run", ServingSettings(gather=0.0))
        self._server.start()
        own = dict.fromkeys(CLIENTS, limits)
        self._access = self._server.open([(server_part, CLIENTS)], 2, 1, own, SOON)

    def link(self, client, wire=None):
        access = self._access[client]
        return GrpcLink(replace(access, limits=with_wire(access.limits, wire)))

    def end(self):
        self._server.stop()


class Patient(Doubling):
    """A server part whose steps wait until all who have not left ask for them."""

    def answer(self, requests):
        steps = {request.id.client for request in requests if isinstance(request, Step)}
        waits = not steps >= set(CLIENTS) - set(self.left)
        later = [waits and isinstance(request, Step) for request in requests]
        now = iter(super().answer([r for r, wait in zip(requests, later, strict=True) if not wait]))
        return [None if wait else next(now) for wait in later]


class Failing(Doubling):
    """A server part that does not keep its promise to refuse what it cannot serve."""

    def answer(self, requests):
        raise ZeroDivisionError


def with_wire(limits, wire):
    return limits if wire is None else replace(limits, codec=codec(wire))


LINKS = (InProcess, Grpc)


@pytest.fixture(params=LINKS)
def meeting(request):
    """Make a server part with links to it; all links are closed in the end."""
    with ExitStack() as stack:

        def make(wire="float32", server_part=None, tokens=TOKENS):
            place = request.param(server_part or Doubling(), FrameLimits(tokens, D, codec(wire)))
            stack.callback(place.end)
            opened = place.link

            def link(client, wire=None):
                one = opened(client, wire)
                stack.callback(one.close)
                return one

            place.link = link
            return place

        yield make


def activations(client="a", step=0, micro=0, last=False, u_shape=False):
    at = RequestId(client, 2, 1, step, micro)
    states = torch.randn(5, D, generator=torch.Generator().manual_seed(step * 10 + micro))
    labels = None if u_shape else torch.tensor([1, -100, 2, 30000, 0])
    return Activations(at, last, 0.1, (2, 3), states, labels)


def test_answers_fit_their_requests(meeting):
    link = meeting().link("a")
    sent = activations()
    returned = link.submit(sent).result()
    assert isinstance(returned, Returned)
    assert returned.id == sent.id
    assert torch.equal(returned.states, sent.states * 2)
    assert returned.squared_norm == 4.0
    stepped = link.submit(Step(sent.id, 0.5)).result()
    assert stepped == Stepped(sent.id)


def test_what_arrives_is_what_was_sent(meeting):
    place = meeting()
    link = place.link("a")
    sent = activations(last=True)
    link.submit(sent).result()
    link.submit(Step(sent.id, 0.5)).result()
    came, step = place.server_part.seen
    assert (came.id, came.last, came.weight, came.lengths) == (sent.id, True, 0.1, (2, 3))
    assert torch.equal(came.states, sent.states)
    assert torch.equal(came.labels, sent.labels)
    assert came.labels.dtype == torch.int64
    assert step == Step(sent.id, 0.5)


def test_a_u_shape_goes_there_and_back_twice(meeting):
    place = meeting()
    link = place.link("a")
    sent = activations(u_shape=True)
    upper = link.submit(sent).result()
    assert torch.equal(upper.states, sent.states * 2)
    gradients = Gradients(sent.id, True, upper.states / 8)
    lower = link.submit(gradients).result()
    assert torch.equal(lower.states, gradients.states * 2)
    assert lower.loss is None
    came, back = place.server_part.seen
    assert came.labels is None
    assert isinstance(back, Gradients)
    assert back.last


def test_several_requests_are_under_way_and_are_answered_in_order(meeting):
    place = meeting()
    link = place.link("a")
    sent = [activations(micro=micro) for micro in range(4)]
    pending = [link.submit(one) for one in sent]
    for one, answer in reversed(list(zip(sent, pending, strict=True))):  # asked for in any order
        assert torch.equal(answer.result().states, one.states * 2)
    assert [came.id for came in place.server_part.seen] == [one.id for one in sent]


def test_many_large_requests_under_way_do_not_block_each_other(meeting):
    """More than any pipe holds goes both ways before the first answer is asked for."""
    link = meeting("float64", tokens=4096).link("a")
    states = torch.randn(4096, D).double()
    pending = [link.submit(Gradients(RequestId("a", 0, 0, 0, k), False, states)) for k in range(8)]
    for answer in pending:
        assert torch.equal(answer.result().states, states * 2)


def test_an_answer_can_be_asked_for_again(meeting):
    link = meeting().link("a")
    pending = link.submit(activations())
    assert pending.result() is pending.result()


def test_a_repeated_request_is_answered_again_and_applied_once(meeting):
    place = meeting()
    link = place.link("a")
    sent = activations()
    first = link.submit(sent).result()
    again = link.submit(sent).result()
    assert torch.equal(first.states, again.states)
    assert (first.id, first.loss, first.squared_norm) == (again.id, again.loss, again.squared_norm)
    assert len(place.server_part.seen) == 2
    assert len(place.server_part.applied) == 1


def test_a_refusal_says_why_and_the_link_stays_usable(meeting):
    link = meeting().link("a")
    refused = link.submit(activations(step=13))
    good = link.submit(activations(step=1))
    for _ in range(2):
        with pytest.raises(FrameError, match=r"client 'a'.*step 13.*there is no step 13"):
            refused.result()
    assert good.result().id.step == 1
    assert link.submit(activations(step=2)).result().id.step == 2


def test_a_refusal_does_not_touch_the_other_clients(meeting):
    place = meeting()
    one, other = place.link("a"), place.link("b")
    refused, good = one.submit(activations(step=13)), other.submit(activations("b"))
    assert torch.equal(good.result().states, activations("b").states * 2)
    with pytest.raises(FrameError):
        refused.result()


def test_a_frame_of_another_client_is_refused_by_the_server(meeting):
    place = meeting()
    link = place.link("a")
    with pytest.raises(FrameError, match="refused: a frame of another client: expected one of 'a'"):
        link.submit(activations("b")).result()
    assert place.server_part.seen == []
    assert link.submit(activations("a")).result().id.client == "a"


def test_another_wire_than_the_server_s_is_refused(meeting):
    place = meeting("bf16")
    link = place.link("a", wire="float32")
    with pytest.raises(FrameError, match=r"refused: .*expected bf16, as agreed; float32 came"):
        link.submit(activations()).result()
    assert place.server_part.seen == []


def test_answers_that_do_not_fit_are_refused_by_the_client(meeting):
    link = meeting(server_part=Wrong()).link("a")
    request = Gradients(RequestId("a", 0, 0, 0), True, torch.ones(3, D))
    reasons = (
        r"expected the answer to client 'a', .* microbatch 0; that to .* microbatch 7 came",
        "expected Returned; Stepped came",
        "expected 3 tokens back; 2 came",
    )
    for step, reason in enumerate(reasons):
        with pytest.raises(FrameError, match=reason):
            link.submit(replace(request, id=RequestId("a", 0, 0, step))).result()
    with pytest.raises(FrameError, match="expected Stepped; Returned came"):
        link.submit(Step(RequestId("a", 0, 0, 3), 1.0)).result()


def test_an_answer_that_is_not_finite_becomes_a_refusal(meeting):
    link = meeting().link("a")
    with pytest.raises(FrameError, match=r"refused: .*finite"):
        link.submit(activations(step=14)).result()


def test_a_request_that_cannot_be_sent_is_refused_at_once_and_the_link_stays_usable(meeting):
    link = meeting().link("a")
    sent = activations()
    with pytest.raises(FrameError, match="finite"):
        link.submit(replace(sent, states=sent.states * torch.nan))
    with pytest.raises(FrameError, match="fewer tokens"):
        link.submit(Gradients(sent.id, True, torch.zeros(2000, D)))
    assert link.traffic == WireBytes()
    assert link.submit(sent).result().id == sent.id


@pytest.mark.parametrize("wire", CODECS)
def test_traffic_is_the_length_of_all_frames(meeting, wire):
    place = meeting(wire)
    link, other = place.link("a"), place.link("b")
    assert link.traffic == WireBytes(0, 0)
    requests = [
        activations(micro=0),
        activations(micro=1, u_shape=True),
        Gradients(RequestId("a", 2, 1, 0), True, torch.randn(4, D)),
        Step(RequestId("a", 2, 1, 0), 0.5),
        activations(step=13),
    ]
    up = down = 0
    for request in requests:
        pending = link.submit(request)
        try:
            reply = pending.result()
        except FrameError:
            reply = Refused(request.id, "there is no step 13")
        up += len(encode(request, codec(wire)))
        down += len(encode(reply, codec(wire), request))
    assert link.traffic == WireBytes(up, down)
    assert other.traffic == WireBytes(0, 0)


@pytest.mark.parametrize("wire", CODECS)
def test_a_wire_acts_in_both_directions_exactly_once(meeting, wire):
    place = meeting(wire)
    link = place.link("a")

    def carried(numbers, states):
        rows, width = states.shape
        return numbers.decode(numbers.encode(states, ""), rows, width, "")

    for u_shape in (False, True):
        sent = activations(micro=int(u_shape), u_shape=u_shape)
        returned = link.submit(sent).result()
        came = place.server_part.seen[-1].states
        assert torch.equal(came, carried(codec(wire).activations, sent.states))
        back = codec(wire).activations if u_shape else codec(wire).gradients
        assert torch.equal(returned.states, carried(back, came * 2))


def test_closing_mid_way_leaves_and_the_others_go_on(meeting):
    place = meeting()
    one, other = place.link("a"), place.link("b")
    one.submit(activations()).result()
    unanswered = one.submit(activations(micro=1))
    one.close()
    with pytest.raises(FrameError, match="closed"):
        one.submit(activations(micro=2))
    with pytest.raises(FrameError, match="no answer came"):
        unanswered.result()
    assert other.submit(activations("b")).result().id.client == "b"
    other.close()
    place.end()
    assert sorted(set(place.server_part.left) & {"a", "b"}) == ["a", "b"]
    assert place.server_part.left.count("a") == 1


def test_closing_twice_is_closing_once(meeting):
    place = meeting()
    link = place.link("a")
    link.close()
    link.close()
    place.end()
    assert place.server_part.left.count("a") == 1


def test_a_request_that_waits_for_others_is_answered_once_they_are_there(meeting):
    """What a client sends after it is answered after it."""
    place = meeting(server_part=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    steps = {}
    for client in CLIENTS:
        assert isinstance(links[client].submit(activations(client)).result(), Returned)
        steps[client] = links[client].submit(Step(RequestId(client, 2, 1, 0), 0.5))
    after = {client: links[client].submit(activations(client, step=1)) for client in CLIENTS}
    for client in CLIENTS:
        assert after[client].result().id == RequestId(client, 2, 1, 1)
        assert steps[client].result() == Stepped(RequestId(client, 2, 1, 0))
    applied = [one.id.client for one in place.server_part.applied if isinstance(one, Step)]
    assert sorted(applied) == list(CLIENTS)


def test_a_client_that_has_left_is_not_waited_for(meeting):
    place = meeting(server_part=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    steps = {c: links[c].submit(Step(RequestId(c, 2, 1, 0), 0.5)) for c in ("a", "b")}
    links["c"].close()
    for client, step in steps.items():
        assert step.result() == Stepped(RequestId(client, 2, 1, 0))


def test_a_request_that_waits_goes_with_its_client(meeting):
    place = meeting(server_part=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    links["a"].submit(Step(RequestId("a", 2, 1, 0), 0.5))
    links["b"].submit(activations("b")).result()  # a's step has come before, and waits
    links["a"].close()
    steps = {c: links[c].submit(Step(RequestId(c, 2, 1, 0), 0.5)) for c in ("b", "c")}
    for client, step in steps.items():
        assert step.result() == Stepped(RequestId(client, 2, 1, 0))
    assert {one.id.client for one in place.server_part.applied if isinstance(one, Step)} == {
        "b",
        "c",
    }


def test_in_process_a_step_whose_others_have_not_asked_has_no_answer_yet():
    links = InProcessLinks(Patient(), "float32", D, TOKENS)
    opened = {client: links.link(client) for client in CLIENTS}
    steps = {c: opened[c].submit(Step(RequestId(c, 2, 1, 0), 0.5)) for c in ("a", "b")}
    with pytest.raises(FrameError, match="the request waits for clients that have not"):
        steps["a"].result()
    opened["c"].submit(Step(RequestId("c", 2, 1, 0), 0.5))
    assert steps["a"].result() == Stepped(RequestId("a", 2, 1, 0))


def test_in_process_the_oldest_requests_of_all_clients_are_answered_together():
    server_part = Doubling()
    links = InProcessLinks(server_part, "float32", D, TOKENS)
    opened = {client: links.link(client) for client in CLIENTS}
    for client, count in zip(CLIENTS, (3, 1, 2), strict=True):
        for micro in range(count):
            pending = opened[client].submit(activations(client, micro=micro))
    assert server_part.seen == []  # nobody needs an answer yet
    pending.result()
    assert server_part.together == [["a", "b", "c"], ["a", "c"], ["a"]]


def test_in_process_a_client_has_one_link_at_a_time():
    links = InProcessLinks(Doubling(), "float32", D, TOKENS)
    first = links.link("a")
    with pytest.raises(FrameError, match="expected no open link"):
        links.link("a")
    first.close()
    assert links.link("a").submit(activations()).result().id.client == "a"


def test_in_process_a_server_part_that_fails_is_heard_and_its_answers_do_not_come():
    link = InProcessLinks(Failing(), "float32", D, TOKENS).link("a")
    pending = link.submit(activations())
    with pytest.raises(ZeroDivisionError):
        pending.result()
    with pytest.raises(FrameError, match="the server part failed"):
        pending.result()
