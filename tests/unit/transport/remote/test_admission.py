"""Streams that stay too long at the server are aborted, whatever their clients read."""

import threading
import time

import grpc
import pytest
import torch

from grpc_rounds import ATTEMPT, IDENTITY, ROUND, SOON, Raw, job, limits, serving, undisturbed
from polyrank.training.split.messages import Activations, RequestId, Returned
from polyrank.transport import ServingSettings
from polyrank.transport.frames import encode
from polyrank.transport.remote import SplitServer
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.admission import AdmissionControl
from polyrank.transport.remote.server_stream import LINGER_SECONDS, ServerStream, StreamLimits
from polyrank.transport.remote.sessions import Sessions
from polyrank.transport.remote.wire import HELLO_SECONDS, METHOD

LIMITS = StreamLimits(credit=2, longest=100, silence=10.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Aborted(list):
    """Makes streams with a clock; lists those that were aborted."""

    def stream(self, clock: Clock) -> ServerStream:
        made = ServerStream(None, Sessions(clock), lambda: self.append(made), clock)
        return made


def eventually(true) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_unauthenticated_stream_too_many_takes_the_place_of_the_oldest():
    clock, aborted = Clock(), Aborted()
    admission = AdmissionControl(2, clock)
    first, known, second, third = (aborted.stream(clock) for _ in range(4))
    for one in (first, known):
        admission.add(one)
    known.welcome("a", LIMITS)
    admission.add(second)
    assert not first.over
    admission.add(third)
    assert first.over
    assert first.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not any(one.over for one in (known, second, third))
    admission.remove(second)
    admission.add(aborted.stream(clock))
    assert not third.over


def test_streams_are_aborted_after_their_deadline():
    clock, aborted = Clock(), Aborted()
    admission = AdmissionControl(9, clock)
    unknown, known, ended, gone = (aborted.stream(clock) for _ in range(4))
    for one in (unknown, known, ended, gone):
        admission.add(one)
    for one in (known, ended, gone):
        one.welcome("a", LIMITS)
    ended.end("it is over")
    gone.end("it is over")
    admission.remove(gone)
    clock.now = LINGER_SECONDS
    admission.check()
    assert aborted == []
    clock.now += 0.1
    admission.check()
    assert aborted == [ended]
    admission.remove(ended)
    clock.now = HELLO_SECONDS + LINGER_SECONDS + 0.1
    admission.check()
    assert aborted == [ended, unknown]
    clock.now = 1e9
    admission.remove(unknown)
    admission.check()
    assert aborted == [ended, unknown]  # who is welcome may stay


def test_a_stream_that_is_over_is_not_made_to_stay_by_a_late_welcome():
    made = Aborted().stream(Clock())
    made.end()
    made.welcome("a", LIMITS)
    assert made.deadline == LINGER_SECONDS


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("polyrank.transport.remote.server_stream.HELLO_SECONDS", 0.3)
    monkeypatch.setattr("polyrank.transport.remote.server_stream.LINGER_SECONDS", 0.3)


def test_unauthenticated_clients_that_do_not_read_do_not_stay(brief):
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
        admission = place.server._admission
        eventually(lambda: len(admission._open) > 20)
        eventually(lambda: not admission._open)
        leave.set()
        for one in channels:
            one.close()
        del calls
        assert place.hashes("a", place.train("a")) == undisturbed()


class Large:
    """A server part whose replies are larger than what a client buffers unread."""

    def answer(self, requests):
        return [Returned(one.id, torch.zeros(4096, 16), 1.0, 1.0) for one in requests]

    def leave(self, client):
        pass


def test_a_client_that_does_not_read_is_gone_after_its_work_has_ended(brief):
    agreed = limits(tokens=4096)
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        access = server.open([(Large(), ["a"])], ROUND, ATTEMPT, {"a": agreed}, SOON)["a"]
        with Raw(access) as raw:
            raw.send(hello=raw.hello())
            assert raw.received().WhichOneof("what") == "welcome"
            for micro in range(6):
                at = RequestId("a", ROUND, ATTEMPT, 0, micro)
                labels = torch.zeros(4, dtype=torch.int64)
                asked = Activations(at, True, 1.0, (4,), torch.zeros(4, 16), labels)
                raw.send(part=pb.Part(data=encode(asked, agreed.codec), last=True))
            eventually(lambda: server.traffic("a").up > 6 * 256)
            server.leave("a")
            eventually(lambda: not server._admission._open)


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


def test_a_client_that_sends_alive_too_often_is_ended():
    with serving([job("a"), job("b")]) as place:
        with Raw(place.access["b"]) as raw:
            raw.send(hello=raw.hello())
            for _ in range(65):
                raw.send(alive=pb.Alive())
            assert "expected at most 64 Alive in 60 s" in raw.ended()
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_a_server_that_was_stopped_says_so():
    server = SplitServer("127.0.0.1:0", IDENTITY, "run")
    server.start()
    server.stop()
    server.stop()
    with pytest.raises(Exception, match="it was stopped; make a new one"):
        server.start()
