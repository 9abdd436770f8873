"""Streams that break, repeat, are late or fall silent: the adapters are those of a quiet run."""

import threading
import time
from dataclasses import replace

import pytest

from grpc_rounds import (
    ATTEMPT,
    IDENTITY,
    OWN,
    ROUND,
    SHARED,
    SOON,
    job,
    limits,
    model,
    serving,
    undisturbed,
)
from polyrank.errors import FrameError, ModelError
from polyrank.planning import CutPoint
from polyrank.training.split import ServerParts, Step, train_client_part
from polyrank.transport import ServingSettings
from polyrank.transport.remote import GrpcLink, SplitServer
from polyrank.transport.remote.reconnecting_stream import ReconnectingStream
from proxy import Proxy

PHASES = ("before request", "after request", "after reply", "before step", "after step")


class Cutting:
    """A link that has its connection cut at the phases and steps that `when` says."""

    def __init__(self, link, cut, when):
        self._link, self._cut, self._when = link, cut, when
        self.traffic_of = link
        self.cuts = 0

    def submit(self, request):
        kind = "step" if isinstance(request, Step) else "request"
        self.at(f"before {kind}", request)
        pending = self._link.submit(request)
        self.at(f"after {kind}", request)
        return Answer(self, pending, request)

    def at(self, phase, request):
        if self._when(phase, request.id):
            self._cut()
            self.cuts += 1

    @property
    def traffic(self):
        return self._link.traffic

    def close(self):
        self._link.close()


class Answer:
    def __init__(self, link, pending, request):
        self._link, self._pending, self._request = link, pending, request

    def result(self):
        found = self._pending.result()
        self._link.at("after reply", self._request)
        return found


class Around:
    """A server part that acts after each of its first `times` answers, before they are sent."""

    def __init__(self, server_part, act, times=10**9):
        self._tail, self._act, self._times = server_part, act, times
        self.asked = []

    def answer(self, requests):
        self.asked += requests
        answers = self._tail.answer(requests)
        if self._times:
            self._times -= 1
            self._act()
        return answers

    def leave(self, client):
        self._tail.leave(client)


def test_over_grpc_the_bits_are_those_of_a_run_in_process():
    with serving([job("a")]) as place:
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_both_ends_count_the_same_bytes():
    with serving([job("a")]) as place:
        link = place.link("a")
        trained = place.train("a", link)
        counted = place.server.traffic("a")
        assert link.traffic == counted
        numbers = trained.metrics
        assert (numbers["wire_up"], numbers["wire_down"]) == (counted.up, counted.down)
        place.server.close()
        assert place.server.traffic("a") == counted


@pytest.mark.parametrize("phase", PHASES)
def test_a_stream_that_is_cut_at_any_phase_goes_on_at_its_step(phase):
    with serving([job("a")]) as place, Proxy(place.access["a"].address) as proxy:
        link = Cutting(place.link("a", proxy.address), proxy.cut, lambda at, _: at == phase)
        assert place.hashes("a", place.train("a", link)) == undisturbed()
        assert link.cuts >= 3
        assert proxy.connections >= 3


def test_a_stream_that_is_cut_again_and_again_goes_on_at_its_step():
    with serving([job("a")]) as place, Proxy(place.access["a"].address) as proxy:
        link = Cutting(place.link("a", proxy.address), proxy.cut, lambda *_: True)
        assert place.hashes("a", place.train("a", link)) == undisturbed()


def test_a_request_whose_reply_was_lost_is_not_applied_again():
    """The stream breaks between the server part's answer and its way back, for every request."""
    proxies = []
    arounds = []

    def around(server_parts):
        arounds.append(Around(server_parts, lambda: proxies[0].cut(), times=4))
        return arounds[0]

    with serving([job("a")], around=around) as place, Proxy(place.access["a"].address) as proxy:
        proxies.append(proxy)
        link = place.link("a", proxy.address)
        assert place.hashes("a", place.train("a", link)) == undisturbed()
        numbers = [(type(one), one.id) for one in arounds[0].asked]
        assert len(set(numbers)) == 5 + 3  # microbatches and steps
        assert len(numbers) > len(set(numbers))  # asked again, and answered again


def test_frames_that_come_twice_change_nothing(monkeypatch):
    """Everything is sent twice on one stream; the second answer is dropped by the client."""
    send, receive = ReconnectingStream.send, ReconnectingStream.receive

    def sent_twice(stream, frame):
        send(stream, frame)
        send(stream, frame)

    def received_twice(stream, since):
        first = receive(stream, since)
        assert receive(stream, since) == first
        return first

    monkeypatch.setattr(ReconnectingStream, "send", sent_twice)
    monkeypatch.setattr(ReconnectingStream, "receive", received_twice)
    with serving([job("a")], serve=ServingSettings(gather=0.0, credit=8)) as place:
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_late_and_slow_frames_change_nothing():
    with serving([job("a")]) as place:
        with Proxy(place.access["a"].address, delay=0.02, rate=500_000) as proxy:
            trained = place.train("a", place.link("a", proxy.address))
        assert place.hashes("a", trained) == undisturbed()


def test_two_clients_train_at_once_each_as_if_alone():
    made = [job("a"), job("b")]
    with serving(made[:1]) as one, serving(made[1:]) as other:
        for place, client in ((one, "a"), (other, "b")):
            assert place.hashes(client, place.train(client)) == undisturbed(client)


def test_a_client_that_falls_silent_leaves_and_the_shared_step_of_the_others_goes_on():
    """Its machine is cut off for good after its first step was held back for the others."""
    serve = ServingSettings(gather=None, silence=2.0)
    made = [job("a"), job("b"), job("c")]
    with serving(made, settings=SHARED, serve=serve) as place:
        with Proxy(place.access["c"].address) as proxy:
            links = {one: place.link(one) for one in ("a", "b")}
            links["c"] = Cutting(
                place.link("c", proxy.address),
                proxy.block,
                lambda at, where: at == "before step" and where.step == 1,
            )
            found = place.train_all(links)
            assert found["a"].failure is None
            assert found["b"].failure is None
            assert "c" in found["c"].failure
            assert "2 s" in found["c"].failure  # the client knows when it has been given up
            assert "nothing came of the client for 2 s" in place.server.failed("c")
            assert place.server.failed("a") is None
            assert place.server_part("a").keys() == place.server_part("b").keys()
            with pytest.raises(FrameError, match=r"took 1 of 3 steps for it and it has left"):
                place.server_part("c")


def test_a_held_step_that_is_sent_again_is_answered_once():
    """A's step waits for b at the server when its stream breaks; b steps only after that."""
    seen, cut_off, arounds = threading.Event(), threading.Event(), []

    def around(server_parts):
        arounds.append(Around(server_parts, lambda: _note(arounds[0], seen)))
        return arounds[0]

    def cut():
        assert seen.wait(SOON)
        proxy.cut()
        cut_off.set()

    first = lambda phase: lambda at, where: at == phase and where.step == 0  # noqa: E731
    with serving([job("a"), job("b")], settings=SHARED, around=around) as place:
        with Proxy(place.access["a"].address) as proxy:
            links = {
                "a": Cutting(place.link("a", proxy.address), cut, first("after step")),
                "b": Cutting(place.link("b"), lambda: cut_off.wait(SOON), first("before step")),
            }
            found = place.train_all(links)
            for client in "ab":  # one answer too many would be that to the next request
                assert found[client].failure is None
            assert place.server_part("a").hash() == place.server_part("b").hash()
            assert proxy.connections == 2


def _note(around, seen):
    """Say so once a's step was asked for."""
    if any(isinstance(one, Step) and one.id.client == "a" for one in around.asked):
        seen.set()


def test_a_client_that_is_slow_and_alive_is_not_silent():
    with serving([job("a")], serve=ServingSettings(gather=0.0, silence=0.3)) as place:
        link = Cutting(place.link("a"), lambda: time.sleep(0.8), lambda at, _: at == "before step")
        assert place.hashes("a", place.train("a", link)) == undisturbed()


def test_a_client_that_never_comes_is_waited_for_until_its_token_expires():
    made = [job("a"), job("b")]
    serve = ServingSettings(gather=None)
    with serving(made, settings=SHARED, serve=serve, seconds=1.0) as place:
        access = replace(place.access["a"], patience=SOON)
        place.access["a"] = access
        assert place.train("a").failure is None
        assert "did not connect before its token expired" in place.server.failed("b")


def test_a_server_part_that_raises_ends_its_clients_and_the_others_go_on():
    def fail():
        raise ZeroDivisionError("of the test")

    jobs, servers = {one: job(one) for one in "ab"}, {one: model() for one in "ab"}
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        with (
            ServerParts(servers["a"], [jobs["a"].at_server(servers["a"])]) as one,
            ServerParts(servers["b"], [jobs["b"].at_server(servers["b"])]) as other,
        ):
            served = [(Around(one, fail), ["a"]), (other, ["b"])]
            access = server.open(served, ROUND, ATTEMPT, dict.fromkeys("ab", limits()), SOON)
            failed = train_client_part(model(), jobs["a"], GrpcLink(access["a"]), OWN)
            assert "its server part failed" in failed.failure
            assert "of the test" not in failed.failure  # that is for the server's owner
            assert "ZeroDivisionError: of the test" in server.failed("a")
            good = train_client_part(model(), jobs["b"], GrpcLink(access["b"]), OWN)
            assert (good.adapter.hash(), other.adapter("b").hash()) == undisturbed("b")
            server.close()


def test_the_owner_can_give_a_client_up_and_the_client_hears_why():
    with serving([job("a")]) as place:
        link = Cutting(
            place.link("a"),
            lambda: place.server.leave("a", "its deadline has passed"),
            lambda at, where: at == "before step" and where.step == 1,
        )
        assert "its deadline has passed" in place.train("a", link).failure
        assert place.server.failed("a") == "its deadline has passed"
        with pytest.raises(FrameError, match="took 1 of 3 steps for it and it has left"):
            place.server_part("a")


def test_the_end_of_the_round_ends_all_streams_and_resuming():
    with serving([job("a")]) as place:
        link = Cutting(
            place.link("a"),
            place.server.close,
            lambda at, where: at == "before step" and where.step == 1,
        )
        assert "the round has ended" in place.train("a", link).failure
        assert "the token is not accepted" in place.train("a").failure


def test_a_server_that_is_gone_is_given_up_once_patience_ends():
    with serving([job("a")]) as place:
        access = replace(place.access["a"], patience=0.5)
        place.access["a"] = access
    trained = place.train("a")
    assert "nothing came from the split server at 127.0.0.1" in trained.failure
    assert "0.5 s" in trained.failure


def test_functions_run_on_the_server_parts_thread_while_clients_train():
    with serving([job("a")]) as place:
        names = {place.server.call(lambda: threading.current_thread().name) for _ in range(2)}
        assert names == {"split server parts"}
        with pytest.raises(ZeroDivisionError):
            place.server.call(lambda: 1 // 0)
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_one_round_follows_another_on_the_same_server():
    with serving([job("a")]) as place:
        with pytest.raises(FrameError, match="no round open"):
            place.server.open([], 0, 0, {}, 1.0)
        assert place.hashes("a", place.train("a")) == undisturbed()
        place.server.close()
        place.server.close()
        assert place.server.open([], 4, 0, {}, 1.0) == {}


def test_a_link_is_closed_when_training_cannot_begin():
    with serving([job("a")]) as place:
        link = place.link("a")
        with pytest.raises(ModelError):
            train_client_part(model(), replace(job("a"), cut=CutPoint(99)), link, OWN)
        assert not link._stream._thread.is_alive()
