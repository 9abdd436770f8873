"""What a stream may bring: everything else ends in a refusal, and no adapter changes."""

import re
import socket
import threading
import time
from dataclasses import replace

import grpc
import pytest

from grpc_rounds import ATTEMPT, ROUND, SOON, Raw, job, serving, undisturbed
from polyrank.errors import FrameError
from polyrank.transport import ServingSettings
from polyrank.transport.remote import GrpcLink, new_identity
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.sessions import SessionId, proof
from polyrank.transport.remote.wire import MESSAGE_BYTES, PART_BYTES

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def place():
    """A server whose client a is left alone by all attacks, and trains in the end."""
    with serving([job("a"), job("b")], serve=ServingSettings(gather=0.0, credit=2)) as opened:
        yield opened


def other(place, client="b", **changes):
    return replace(place.access[client], **changes)


def welcomed(access):
    """Return a raw stream that was welcomed."""
    raw = Raw(access)
    raw.send(hello=raw.hello())
    assert raw.received().WhichOneof("what") == "welcome"
    return raw


WRONG = [
    ("no version", {"version": 0}, INVALID, "version: expected 1"),
    ("another version", {"version": 2}, INVALID, "version: expected 1"),
    ("no run", {"run": ""}, INVALID, "hello, run: expected 1 to 1024 bytes"),
    ("a long name", {"client": "x" * 1025}, INVALID, "hello, client: expected 1 to 1024 bytes"),
    ("neither way", {"first": None}, INVALID, "expected a token or resume"),
    ("a short token", {"first": pb.Hello.First(token=b"t", secret=b"s" * 32)}, INVALID, "token"),
    ("a short secret", {"first": pb.Hello.First(token=b"t" * 32)}, INVALID, "secret: expected 32"),
    (
        "a wrong token",
        {"first": pb.Hello.First(token=b"t" * 32, secret=b"s" * 32)},
        UNAUTHENTICATED,
        "the token is not accepted",
    ),
    ("another client's token", {"client": "a"}, UNAUTHENTICATED, "the token is not accepted"),
    ("nobody's token", {"client": "nobody"}, UNAUTHENTICATED, "the token is not accepted"),
    ("another run's", {"run": "other"}, UNAUTHENTICATED, "the token is not accepted"),
    ("another round's", {"round": ROUND + 1}, UNAUTHENTICATED, "the token is not accepted"),
    ("another attempt's", {"attempt": ATTEMPT + 1}, UNAUTHENTICATED, "the token is not accepted"),
]


@pytest.mark.parametrize(
    ("changes", "code", "reason"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_a_wrong_hello_is_refused_with_a_reason(place, changes, code, reason):
    with Raw(place.access["b"]) as raw:
        raw.send(hello=raw.hello(**changes))
        came, details = raw.refused()
        assert came is code
        assert reason in details


@pytest.mark.parametrize(
    "message",
    [b"", b"garbage", b"\x0a\xff\xff\xff\xff\x0f", pb.Up(bye=pb.Bye()).SerializeToString(),
     pb.Up(alive=pb.Alive()).SerializeToString(), pb.Up(proof=pb.Proof()).SerializeToString(),
     pb.Up(part=pb.Part(data=b"x", last=True)).SerializeToString()],
)  # fmt: skip
def test_messages_before_a_hello_are_refused(place, message):
    with Raw(place.access["b"]) as raw:
        raw.send(message)
        assert raw.refused()[0] is INVALID


def test_a_token_that_was_redeemed_is_not_accepted_again():
    with serving([job("a"), job("b")]) as place:
        with welcomed(place.access["b"]), Raw(place.access["b"]) as raw:
            raw.send(hello=raw.hello())
            assert raw.refused()[0] is UNAUTHENTICATED
        trained = place.train("b")  # an honest client whose token a thief was quicker to redeem
        assert "the token is not accepted" in trained.failure
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_an_expired_token_is_not_accepted():
    with serving([job("a")], seconds=0.01) as place:
        time.sleep(0.05)
        with Raw(place.access["a"]) as raw:
            raw.send(hello=raw.hello())
            assert raw.refused()[0] is UNAUTHENTICATED


def test_only_the_secret_of_the_session_resumes():
    with serving([job("a"), job("b")]) as place:
        access = place.access["b"]
        work = SessionId("run", ROUND, ATTEMPT, "b")

        def resumed(secret, changed=work, message=None):
            with Raw(access) as raw:
                raw.send(hello=raw.resume())
                nonce = raw.received().challenge.nonce
                assert len(nonce) == 32
                raw.send(message, proof=pb.Proof(hmac=proof(secret, nonce, changed)))
                return raw.received()

        assert resumed(b"s" * 32)[0] is grpc.StatusCode.NOT_FOUND  # no session yet
        first = welcomed(access)
        for secret, changed in (
            (b"t" * 32, work),
            (access.token, work),
            (b"s" * 32, replace(work, client="a")),
            (b"s" * 32, replace(work, round=ROUND + 1)),
        ):
            assert resumed(secret, changed)[0] is grpc.StatusCode.NOT_FOUND
        hello = pb.Up(hello=Raw.hello(first)).SerializeToString()
        assert resumed(b"s" * 32, message=hello)[0] is INVALID  # no second Hello on a stream
        first.send(alive=pb.Alive())  # the stream that has the session was not touched by all this
        first.send(part=pb.Part(data=b"nonsense", last=True))
        assert first.received().WhichOneof("what") == "part"
        assert resumed(b"s" * 32).WhichOneof("what") == "welcome"
        over = (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)  # replaced; which one is a race
        assert first.refused()[0] in over
        first.__exit__()
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_a_server_with_another_certificate_is_refused_at_once(place):
    certificate = new_identity(["127.0.0.1"]).certificate
    link = GrpcLink(other(place, certificate=certificate))
    # At once: after its patience the reason would be another one.
    with pytest.raises(FrameError, match="it does not have the pinned certificate"):
        link._stream.receive(time.monotonic())
    link.close()


def test_a_host_that_the_certificate_does_not_name_is_refused_at_once():
    with serving([job("a")]) as place:
        port = place.access["a"].address.rpartition(":")[2]
        link = GrpcLink(other(place, "a", address=f"127.0.0.2:{port}"))
        link.close()
        # 127.0.0.2 is this machine too, but no server listens there: it binds to what it is given.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(port)), timeout=5)


def test_a_server_that_speaks_no_tls_gets_no_token(place):
    listener = socket.create_server(("127.0.0.1", 0))
    came = []

    def answer():
        connection, _ = listener.accept()
        came.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    access = other(place, address=f"127.0.0.1:{listener.getsockname()[1]}")
    link = GrpcLink(access)
    with pytest.raises(FrameError, match="or speaks no TLS"):
        link._stream.receive(time.monotonic())
    link.close()
    thread.join(SOON)
    listener.close()
    assert came[0][:1] == b"\x16"  # a TLS handshake, and nothing else
    assert access.token not in came[0]


def test_a_client_that_speaks_no_tls_gets_nothing(place):
    with grpc.insecure_channel(place.access["b"].address) as plain:
        call = plain.unary_unary("/polyrank.split.v1.Split/Train")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_without_the_certificate_does_not_trust_the_server(place):
    credentials = grpc.ssl_channel_credentials()  # the authorities that this machine knows
    with grpc.secure_channel(place.access["b"].address, credentials) as channel:
        call = channel.unary_unary("/polyrank.split.v1.Split/Train")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_no_secret_is_in_what_a_link_shows_or_raises(place):
    access = other(place, client="a", token=b"\x07" * 32)
    link = GrpcLink(access)
    with pytest.raises(FrameError) as caught:
        link._stream.receive(time.monotonic())
    shown = f"{link!r} {caught.value!r} {access!r} {link._stream._stream!r}"
    link.close()
    assert "x07" not in shown
    assert repr(link._stream._session._secret) not in shown


def test_more_requests_than_credit_are_cut_off():
    """The first waits for b, who never asks: credit is 2, and the third is one too many."""
    made = [job("a"), job("b")]
    with serving(made, serve=ServingSettings(gather=None, credit=2)) as place:
        with welcomed(place.access["b"]) as raw:
            for _ in range(3):
                raw.send(part=pb.Part(data=b"nonsense", last=True))
            assert "expected at most 2 requests without reply" in raw.ended()
        assert "without reply" in place.server.failed("b")
        assert place.hashes("a", place.train("a")) == undisturbed()


BAD_PARTS = [
    ("an empty part", [pb.Part(last=True)], "expected 1 to"),
    ("a short part", [pb.Part(data=bytes(PART_BYTES - 1))], "expected 262144 to"),
    ("a long part", [pb.Part(data=bytes(PART_BYTES + 1), last=True)], "expected 1 to"),
    ("a long frame", [pb.Part(data=bytes(PART_BYTES))], "expected at most .* bytes; more came"),
]


@pytest.mark.parametrize(
    ("sent", "reason"), [b[1:] for b in BAD_PARTS], ids=[b[0] for b in BAD_PARTS]
)
def test_parts_beyond_the_bounds_end_the_work(sent, reason):
    with serving([job("a"), job("b")]) as place:
        with welcomed(place.access["b"]) as raw:
            for part in sent:
                raw.send(part=part)
            assert re.search(reason, raw.ended())
        with Raw(place.access["b"]) as raw:  # and it cannot be resumed
            raw.send(hello=raw.resume())
            nonce = raw.received().challenge.nonce
            work = SessionId("run", ROUND, ATTEMPT, "b")
            raw.send(proof=pb.Proof(hmac=proof(b"s" * 32, nonce, work)))
            assert re.search(reason, raw.ended())
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_a_message_that_is_too_long_ends_its_stream_unread(place):
    with Raw(place.access["b"]) as raw:
        raw.send(bytes(MESSAGE_BYTES + 1))
        assert raw.refused()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unauthenticated_streams_are_few_and_refused(monkeypatch):
    monkeypatch.setattr("polyrank.transport.remote.server_stream.HELLO_SECONDS", 0.5)
    with serving([job("a")]) as place:
        raws = [Raw(place.access["a"]) for _ in range(40)]
        codes = [raw.refused()[0] for raw in raws]
        for raw in raws:
            raw.__exit__()
        assert set(codes) == {
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 40 - 33
        assert place.hashes("a", place.train("a")) == undisturbed()


def test_more_clients_than_streams_are_told_to_try_again():
    made = [job("a"), job("b")]
    with serving(made, serve=ServingSettings(gather=0.0, streams=1)) as place:
        first = welcomed(place.access["b"])
        with Raw(place.access["a"]) as raw:
            raw.send(hello=raw.resume())
            assert raw.received().WhichOneof("what") == "challenge"
        link = place.link("a")
        first.send(bye=pb.Bye())
        assert first.refused()[0] is grpc.StatusCode.OK
        first.__exit__()
        assert place.hashes("a", place.train("a", link)) == undisturbed()


@pytest.mark.parametrize("silence", [0.0, 1e-9, float("inf"), float("nan"), 1e12])
def test_a_server_cannot_have_its_client_say_alive_without_end_or_never(place, silence):
    link = GrpcLink(other(place, address="127.0.0.1:1"))
    welcome = pb.Welcome(credit=1, longest=1, silence=silence)
    with link._stream._changed:
        link._stream._receive(link._stream._stream, pb.Down(welcome=welcome).SerializeToString())
    with pytest.raises(FrameError, match="not due came: welcome"):
        link._stream.receive(time.monotonic())
    link.close()
