"""Who may stay at the server: streams that outstay are broken off, whatever their clients read."""

import threading
import time

import grpc
import pytest
import torch

from polyrank.training.split.messages import Activations, At, Returned
from polyrank.transport.frames import encode
from polyrank.transport.remote import ServeSettings, SplitServer
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.admission import AdmissionControl
from polyrank.transport.remote.server_stream import LINGER_SECONDS, ServerStream, Terms
from polyrank.transport.remote.sessions import Sessions
from polyrank.transport.remote.wire import HELLO_SECONDS, METHOD
from remote import ATTEMPT, IDENTITY, ROUND, SOON, Raw, job, limits, serving, undisturbed

TERMS = Terms(credit=2, longest=100, silence=10.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Cut(list):
    """Streams of a clock's time, and which of them were cut."""

    def stream(self, clock: Clock) -> ServerStream:
        made = ServerStream(None, Sessions(clock), lambda: self.append(made), clock)
        return made


def eventually(true) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_stranger_too_many_takes_the_place_of_the_oldest():
    clock, cut = Clock(), Cut()
    door = AdmissionControl(2, clock)
    first, known, second, third = (cut.stream(clock) for _ in range(4))
    for one in (first, known):
        door.enter(one)
    known.welcome("a", TERMS)
    door.enter(second)
    assert not first.over
    door.enter(third)
    assert first.over
    assert first.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not any(one.over for one in (known, second, third))
    door.leave(second)
    door.enter(cut.stream(clock))
    assert not third.over


def test_streams_are_broken_off_when_their_time_is_over():
    clock, cut = Clock(), Cut()
    door = AdmissionControl(9, clock)
    stranger, known, ended, gone = (cut.stream(clock) for _ in range(4))
    for one in (stranger, known, ended, gone):
        door.enter(one)
    for one in (known, ended, gone):
        one.welcome("a", TERMS)
    ended.end("it is over")
    gone.end("it is over")
    door.leave(gone)
    clock.now = LINGER_SECONDS
    door.look()
    assert cut == []
    clock.now += 0.1
    door.look()
    assert cut == [ended]
    door.leave(ended)
    clock.now = HELLO_SECONDS + LINGER_SECONDS + 0.1
    door.look()
    assert cut == [ended, stranger]
    clock.now = 1e9
    door.leave(stranger)
    door.look()
    assert cut == [ended, stranger]  # who is welcome may stay


def test_a_stream_that_is_over_is_not_made_to_stay_by_a_late_welcome():
    made = Cut().stream(Clock())
    made.end()
    made.welcome("a", TERMS)
    assert made.until == LINGER_SECONDS


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("polyrank.transport.remote.server_stream.HELLO_SECONDS", 0.3)
    monkeypatch.setattr("polyrank.transport.remote.server_stream.LINGER_SECONDS", 0.3)


def test_strangers_that_do_not_read_do_not_stay(brief):
    """Their windows are too small for the Challenge, so that their streams cannot end in order."""
    with serving([job("a")]) as place:
        access = place.access["a"]
        credentials = grpc.ssl_channel_credentials(access.certificate)
        options = [("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0)]
        hello = pb.Up(hello=pb.Hello(version=1, run="run", client="x", resume=pb.Hello.Resume()))
        leave = threading.Event()

        def words():
            yield hello.SerializeToString()
            leave.wait()

        channels = [grpc.secure_channel(access.address, credentials, options) for _ in range(20)]
        calls = [one.stream_stream(METHOD)(words()) for one in channels for _ in range(3)]
        door = place.server._door
        eventually(lambda: len(door._open) > 20)
        eventually(lambda: not door._open)
        leave.set()
        for one in channels:
            one.close()
        del calls
        assert place.hashes("a", place.head("a")) == undisturbed()


class Large:
    """A tail whose answers are larger than what a client takes in unread."""

    def answer(self, requests):
        return [Returned(one.at, torch.zeros(4096, 16), 1.0, 1.0) for one in requests]

    def leave(self, client):
        pass


def test_a_client_that_does_not_read_is_gone_after_its_work_has_ended(brief):
    agreed = limits(tokens=4096)
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServeSettings(gather=0.0)) as server:
        access = server.open([(Large(), ["a"])], ROUND, ATTEMPT, {"a": agreed}, SOON)["a"]
        with Raw(access) as raw:
            raw.send(hello=raw.hello())
            assert raw.received().WhichOneof("what") == "welcome"
            for micro in range(6):
                at = At("a", ROUND, ATTEMPT, 0, micro)
                labels = torch.zeros(4, dtype=torch.int64)
                asked = Activations(at, True, 1.0, (4,), torch.zeros(4, 16), labels)
                raw.send(part=pb.Part(data=encode(asked, agreed.codec), last=True))
            eventually(lambda: server.traffic("a").up > 6 * 256)
            server.leave("a")
            eventually(lambda: not server._door._open)


def test_compressed_messages_are_refused_unread():
    with serving([job("a")]) as place:
        access = place.access["a"]
        credentials = grpc.ssl_channel_credentials(access.certificate)
        squeezed = grpc.Compression.Gzip
        with grpc.secure_channel(access.address, credentials, compression=squeezed) as channel:
            call = channel.stream_stream(METHOD)(iter([bytes(2**16)]))
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_who_keeps_saying_that_it_is_alive_is_ended():
    with serving([job("a"), job("b")]) as place:
        with Raw(place.access["b"]) as raw:
            raw.send(hello=raw.hello())
            for _ in range(65):
                raw.send(alive=pb.Alive())
            assert "expected at most 64 Alive in 60 s" in raw.ended()
        assert place.hashes("a", place.head("a")) == undisturbed()


def test_a_server_that_was_stopped_says_so():
    server = SplitServer("127.0.0.1:0", IDENTITY, "run")
    server.start()
    server.stop()
    server.stop()
    with pytest.raises(Exception, match="it was stopped; make a new one"):
        server.start()
