"""What every link must give, whatever carries it: in process, over pipes, over gRPC and TLS."""

import multiprocessing
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
import torch

from polyrank.errors import FrameError
from polyrank.training.split import (
    Activations,
    At,
    Gradients,
    Refused,
    Returned,
    Step,
    Stepped,
    Traffic,
)
from polyrank.transport import (
    InProcessLink,
    InProcessLinks,
    Limits,
    PipeLink,
    codec,
    encode,
    serve_pipe,
)
from polyrank.transport.remote import GrpcLink, ServeSettings, SplitServer, new_identity

D = 6
TOKENS = 8
CLIENTS = ("a", "b", "c")
SOON = 60  # seconds until a test gives up; nothing is measured by it


class Doubling:
    """A tail that returns states times two, remembers what came, and applies nothing twice."""

    def __init__(self):
        self.seen, self.applied, self.left, self.together = [], [], [], []
        self._answers = {}

    def answer(self, requests):
        self.seen += requests
        self.together.append([request.at.client for request in requests])
        return [self._one(request) for request in requests]

    def _one(self, request):
        key = (type(request), request.at)
        if request.at.step == 13:
            return Refused(request.at, "there is no step 13")
        if request.at.step == 14:
            return Returned(request.at, request.states * torch.inf)
        if key not in self._answers:
            self.applied.append(request)
            if isinstance(request, Step):
                self._answers[key] = Stepped(request.at)
            else:
                loss = float(request.states.sum()) if isinstance(request, Activations) else None
                self._answers[key] = Returned(request.at, request.states * 2, loss, 4.0)
        return self._answers[key]

    def leave(self, client):
        self.left.append(client)


class Wrong(Doubling):
    """A tail that answers what was not asked, as each step says."""

    def _one(self, request):
        states = torch.ones(3, D)
        return {
            0: Returned(replace(request.at, micro=7), states),
            1: Stepped(request.at),
            2: Returned(request.at, states[:2]),
            3: Returned(request.at, states),
        }[request.at.step]


class InProcess:
    """Links within this process."""

    def __init__(self, tail, limits):
        self.tail, self._limits = tail, limits
        self._links = InProcessLinks(tail, limits.codec.name, limits.width, limits.tokens)

    def link(self, client, wire=None):
        return InProcessLink(self._links, client, with_wire(self._limits, wire))

    def end(self):
        """Nothing but links was opened."""


class Piped:
    """Links over pipes, served by a thread."""

    def __init__(self, tail, limits):
        self.tail, self._limits = tail, limits
        pipes = {client: multiprocessing.Pipe() for client in CLIENTS}
        self._ours = {client: ours for client, (ours, _) in pipes.items()}
        theirs = {client: theirs for client, (_, theirs) in pipes.items()}
        self._server = served(tail, theirs, limits)

    def link(self, client, wire=None):
        return PipeLink(self._ours[client], client, with_wire(self._limits, wire))

    def end(self):
        """Close what no link has taken, and wait until the server has seen the end of all."""
        for connection in self._ours.values():
            connection.close()
        self._server.join(SOON)
        assert not self._server.is_alive()


class Grpc:
    """Links over gRPC and TLS, through the machine's own network."""

    def __init__(self, tail, limits):
        self.tail = tail
        identity = new_identity(["127.0.0.1"])
        self._server = SplitServer("127.0.0.1:0", identity, "run", ServeSettings(gather=0.0))
        self._server.start()
        own = dict.fromkeys(CLIENTS, limits)
        self._access = self._server.open([(tail, CLIENTS)], 2, 1, own, SOON)

    def link(self, client, wire=None):
        access = self._access[client]
        return GrpcLink(replace(access, limits=with_wire(access.limits, wire)))

    def end(self):
        self._server.stop()


class Patient(Doubling):
    """A tail whose steps wait until all who have not left ask for them."""

    def answer(self, requests):
        steps = {request.at.client for request in requests if isinstance(request, Step)}
        waits = not steps >= set(CLIENTS) - set(self.left)
        later = [waits and isinstance(request, Step) for request in requests]
        now = iter(super().answer([r for r, wait in zip(requests, later, strict=True) if not wait]))
        return [None if wait else next(now) for wait in later]


class Failing(Doubling):
    """A tail that does not keep its promise to refuse what it cannot serve."""

    def answer(self, requests):
        raise ZeroDivisionError


def with_wire(limits, wire):
    return limits if wire is None else replace(limits, codec=codec(wire))


def served(tail, theirs, limits):
    """A thread that serves pipes, and ends quietly if the tail fails."""

    def serve():
        with suppress(ZeroDivisionError):
            serve_pipe(tail, theirs, limits)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    return server


@pytest.fixture(params=[InProcess, Piped, Grpc])
def meeting(request):
    """Make a tail with links to it; all links are closed in the end."""
    with ExitStack() as stack:

        def make(wire="float32", tail=None, tokens=TOKENS):
            place = request.param(tail or Doubling(), Limits(tokens, D, codec(wire)))
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
    at = At(client, 2, 1, step, micro)
    states = torch.randn(5, D, generator=torch.Generator().manual_seed(step * 10 + micro))
    labels = None if u_shape else torch.tensor([1, -100, 2, 30000, 0])
    return Activations(at, last, 0.1, (2, 3), states, labels)


def test_answers_fit_their_requests(meeting):
    link = meeting().link("a")
    sent = activations()
    returned = link.submit(sent).result()
    assert isinstance(returned, Returned)
    assert returned.at == sent.at
    assert torch.equal(returned.states, sent.states * 2)
    assert returned.squared_norm == 4.0
    stepped = link.submit(Step(sent.at, 0.5)).result()
    assert stepped == Stepped(sent.at)


def test_what_arrives_is_what_was_sent(meeting):
    place = meeting()
    link = place.link("a")
    sent = activations(last=True)
    link.submit(sent).result()
    link.submit(Step(sent.at, 0.5)).result()
    came, step = place.tail.seen
    assert (came.at, came.last, came.weight, came.lengths) == (sent.at, True, 0.1, (2, 3))
    assert torch.equal(came.states, sent.states)
    assert torch.equal(came.labels, sent.labels)
    assert came.labels.dtype == torch.int64
    assert step == Step(sent.at, 0.5)


def test_a_u_shape_goes_there_and_back_twice(meeting):
    place = meeting()
    link = place.link("a")
    sent = activations(u_shape=True)
    upper = link.submit(sent).result()
    assert torch.equal(upper.states, sent.states * 2)
    gradients = Gradients(sent.at, True, upper.states / 8)
    lower = link.submit(gradients).result()
    assert torch.equal(lower.states, gradients.states * 2)
    assert lower.loss is None
    came, back = place.tail.seen
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
    assert [came.at for came in place.tail.seen] == [one.at for one in sent]


def test_many_large_requests_under_way_do_not_block_each_other(meeting):
    """More than any pipe holds goes both ways before the first answer is asked for."""
    link = meeting("float64", tokens=4096).link("a")
    states = torch.randn(4096, D).double()
    pending = [link.submit(Gradients(At("a", 0, 0, 0, k), False, states)) for k in range(8)]
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
    assert (first.at, first.loss, first.squared_norm) == (again.at, again.loss, again.squared_norm)
    assert len(place.tail.seen) == 2
    assert len(place.tail.applied) == 1


def test_what_is_refused_says_why_and_the_link_stays_usable(meeting):
    link = meeting().link("a")
    refused = link.submit(activations(step=13))
    good = link.submit(activations(step=1))
    for _ in range(2):
        with pytest.raises(FrameError, match=r"client 'a'.*step 13.*there is no step 13"):
            refused.result()
    assert good.result().at.step == 1
    assert link.submit(activations(step=2)).result().at.step == 2


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
    assert place.tail.seen == []
    assert link.submit(activations("a")).result().at.client == "a"


def test_another_wire_than_the_server_s_is_refused(meeting):
    place = meeting("bf16")
    link = place.link("a", wire="float32")
    with pytest.raises(FrameError, match=r"refused: .*expected bf16, as agreed; float32 came"):
        link.submit(activations()).result()
    assert place.tail.seen == []


def test_answers_that_do_not_fit_are_refused_by_the_client(meeting):
    link = meeting(tail=Wrong()).link("a")
    request = Gradients(At("a", 0, 0, 0), True, torch.ones(3, D))
    reasons = (
        r"expected the answer to client 'a', .* microbatch 0; that to .* microbatch 7 came",
        "expected Returned; Stepped came",
        "expected 3 tokens back; 2 came",
    )
    for step, reason in enumerate(reasons):
        with pytest.raises(FrameError, match=reason):
            link.submit(replace(request, at=At("a", 0, 0, step))).result()
    with pytest.raises(FrameError, match="expected Stepped; Returned came"):
        link.submit(Step(At("a", 0, 0, 3), 1.0)).result()


def test_an_answer_that_is_not_finite_becomes_a_refusal(meeting):
    link = meeting().link("a")
    with pytest.raises(FrameError, match=r"refused: .*finite"):
        link.submit(activations(step=14)).result()


def test_what_cannot_be_sent_is_refused_at_once_and_the_link_stays_usable(meeting):
    link = meeting().link("a")
    sent = activations()
    with pytest.raises(FrameError, match="finite"):
        link.submit(replace(sent, states=sent.states * torch.nan))
    with pytest.raises(FrameError, match="fewer tokens"):
        link.submit(Gradients(sent.at, True, torch.zeros(2000, D)))
    assert link.traffic == Traffic()
    assert link.submit(sent).result().at == sent.at


@pytest.mark.parametrize("wire", ["float64", "float32", "bf16", "int8"])
def test_traffic_is_the_length_of_all_frames(meeting, wire):
    place = meeting(wire)
    link, other = place.link("a"), place.link("b")
    assert link.traffic == Traffic(0, 0)
    requests = [
        activations(micro=0),
        activations(micro=1, u_shape=True),
        Gradients(At("a", 2, 1, 0), True, torch.randn(4, D)),
        Step(At("a", 2, 1, 0), 0.5),
        activations(step=13),
    ]
    up = down = 0
    for request in requests:
        pending = link.submit(request)
        try:
            reply = pending.result()
        except FrameError:
            reply = Refused(request.at, "there is no step 13")
        up += len(encode(request, codec(wire)))
        down += len(encode(reply, codec(wire), request))
    assert link.traffic == Traffic(up, down)
    assert other.traffic == Traffic(0, 0)


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_a_lossy_wire_acts_in_both_directions_exactly_once(meeting, wire):
    place = meeting(wire)
    link = place.link("a")

    def carried(coding, states):
        rows, width = states.shape
        return coding.decode(coding.encode(states, ""), rows, width, "")

    for u_shape in (False, True):
        sent = activations(micro=int(u_shape), u_shape=u_shape)
        returned = link.submit(sent).result()
        came = place.tail.seen[-1].states
        assert torch.equal(came, carried(codec(wire).activations, sent.states))
        assert not torch.equal(came, sent.states)
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
    assert other.submit(activations("b")).result().at.client == "b"
    other.close()
    place.end()
    assert sorted(set(place.tail.left) & {"a", "b"}) == ["a", "b"]
    assert place.tail.left.count("a") == 1


def test_closing_twice_is_closing_once(meeting):
    place = meeting()
    link = place.link("a")
    link.close()
    link.close()
    place.end()
    assert place.tail.left.count("a") == 1


def test_a_request_that_waits_for_others_is_answered_once_they_are_there(meeting):
    """What a client sends after it is answered after it."""
    place = meeting(tail=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    steps = {}
    for client in CLIENTS:
        assert isinstance(links[client].submit(activations(client)).result(), Returned)
        steps[client] = links[client].submit(Step(At(client, 2, 1, 0), 0.5))
    after = {client: links[client].submit(activations(client, step=1)) for client in CLIENTS}
    for client in CLIENTS:
        assert after[client].result().at == At(client, 2, 1, 1)
        assert steps[client].result() == Stepped(At(client, 2, 1, 0))
    applied = [one.at.client for one in place.tail.applied if isinstance(one, Step)]
    assert sorted(applied) == list(CLIENTS)


def test_who_leaves_is_waited_for_no_more(meeting):
    place = meeting(tail=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    steps = {c: links[c].submit(Step(At(c, 2, 1, 0), 0.5)) for c in ("a", "b")}
    links["c"].close()
    for client, step in steps.items():
        assert step.result() == Stepped(At(client, 2, 1, 0))


def test_a_request_that_waits_goes_with_its_client(meeting):
    place = meeting(tail=Patient())
    links = {client: place.link(client) for client in CLIENTS}
    links["a"].submit(Step(At("a", 2, 1, 0), 0.5))
    links["b"].submit(activations("b")).result()  # a's step has come before, and waits
    links["a"].close()
    steps = {c: links[c].submit(Step(At(c, 2, 1, 0), 0.5)) for c in ("b", "c")}
    for client, step in steps.items():
        assert step.result() == Stepped(At(client, 2, 1, 0))
    assert {one.at.client for one in place.tail.applied if isinstance(one, Step)} == {"b", "c"}


def test_in_process_a_step_whose_others_have_not_asked_has_no_answer_yet():
    links = InProcessLinks(Patient(), "float32", D, TOKENS)
    opened = {client: links.link(client) for client in CLIENTS}
    steps = {c: opened[c].submit(Step(At(c, 2, 1, 0), 0.5)) for c in ("a", "b")}
    with pytest.raises(FrameError, match="it waits for clients that have not asked yet"):
        steps["a"].result()
    opened["c"].submit(Step(At("c", 2, 1, 0), 0.5))
    assert steps["a"].result() == Stepped(At("a", 2, 1, 0))


def test_in_process_the_oldest_requests_of_all_clients_are_answered_together():
    tail = Doubling()
    links = InProcessLinks(tail, "float32", D, TOKENS)
    opened = {client: links.link(client) for client in CLIENTS}
    for client, count in zip(CLIENTS, (3, 1, 2), strict=True):
        for micro in range(count):
            pending = opened[client].submit(activations(client, micro=micro))
    assert tail.seen == []  # nobody needs an answer yet
    pending.result()
    assert tail.together == [["a", "b", "c"], ["a", "c"], ["a"]]


def test_in_process_a_client_has_one_link_at_a_time():
    links = InProcessLinks(Doubling(), "float32", D, TOKENS)
    first = links.link("a")
    with pytest.raises(FrameError, match="expected no open link"):
        links.link("a")
    first.close()
    assert links.link("a").submit(activations()).result().at.client == "a"


def test_in_process_a_tail_that_fails_is_heard_and_its_answers_do_not_come():
    link = InProcessLinks(Failing(), "float32", D, TOKENS).link("a")
    pending = link.submit(activations())
    with pytest.raises(ZeroDivisionError):
        pending.result()
    with pytest.raises(FrameError, match="the tail failed"):
        pending.result()


@pytest.fixture
def piped():
    """A pipe of clients a and b to a served tail: the tail, and this end of each pipe."""
    tail, limits = Doubling(), Limits(TOKENS, D, codec("float32"))
    pipes = {client: multiprocessing.Pipe() for client in ("a", "b")}
    theirs = {client: pipe[1] for client, pipe in pipes.items()}
    server = served(tail, theirs, limits)
    yield tail, {client: pipe[0] for client, pipe in pipes.items()}, limits
    for ours, _ in pipes.values():
        ours.close()
    server.join(SOON)
    assert not server.is_alive()


def test_through_a_pipe_a_malformed_frame_is_refused_and_its_connection_goes_on(piped):
    tail, ours, limits = piped
    for garbage in (
        b"",
        b"nonsense",
        b"\x80\x04N.",
        encode(Stepped(At("a", 0, 0, 0)), limits.codec),
    ):
        ours["a"].send_bytes(garbage)
        assert b"expected" in ours["a"].recv_bytes()
    link = PipeLink(ours["a"], "a", limits)
    assert link.submit(activations()).result().at == activations().at
    link.close()
    assert len(tail.seen) == 1


def test_through_a_pipe_too_long_a_frame_is_refused_and_the_others_go_on(piped):
    tail, ours, limits = piped
    ours["a"].send_bytes(bytes(limits.nbytes + 1))
    assert b"the connection is closed" in ours["a"].recv_bytes()
    link = PipeLink(ours["b"], "b", limits)
    assert link.submit(activations("b")).result().at.client == "b"
    link.close()
    assert tail.left[0] == "a"


def test_through_a_pipe_a_server_that_fails_is_heard_of_by_all_clients():
    limits = Limits(TOKENS, D, codec("float32"))
    pipes = {client: multiprocessing.Pipe() for client in ("a", "b")}
    theirs = {client: pipe[1] for client, pipe in pipes.items()}
    server = served(Failing(), theirs, limits)
    links = {client: PipeLink(pipe[0], client, limits) for client, pipe in pipes.items()}
    pending = links["a"].submit(activations())
    with pytest.raises(FrameError, match=r"no answer came: the (server has closed|pipe to)"):
        pending.result()
    server.join(SOON)
    with pytest.raises(FrameError, match="broken"):
        links["b"].submit(activations("b"))
    for link in links.values():
        link.close()


def serve_in_child(theirs):
    """The other process: it serves until all have closed."""
    serve_pipe(Doubling(), theirs, Limits(TOKENS, D, codec("bf16")))


def test_two_processes_train_through_pipes_and_see_each_other_end():
    context = multiprocessing.get_context("spawn")
    pipes = {client: context.Pipe() for client in ("a", "b")}
    theirs = {client: pipe[1] for client, pipe in pipes.items()}
    child = context.Process(target=serve_in_child, args=(theirs,))
    child.start()
    try:
        for connection in theirs.values():
            connection.close()
        limits = Limits(TOKENS, D, codec("bf16"))
        links = {client: PipeLink(pipe[0], client, limits) for client, pipe in pipes.items()}
        pending = {
            client: [link.submit(activations(client, micro=micro)) for micro in range(2)]
            for client, link in links.items()
        }
        for client, answers in pending.items():
            for micro, answer in enumerate(answers):
                came = activations(client, micro=micro).states.bfloat16().float()
                assert torch.equal(answer.result().states, came * 2)
        links["a"].close()
        assert links["b"].submit(activations("b", step=1)).result().at.step == 1
        child.kill()
        child.join(SOON)
        with pytest.raises(FrameError, match=r"no answer came|broken"):
            links["b"].submit(activations("b", step=2)).result()
        links["b"].close()
    finally:
        child.kill()
        child.join(SOON)
    assert child.exitcode is not None
