"""Ten thousand messages that nobody should send end in refusals, and nobody else is touched."""

import random
import struct
import zlib
from collections import defaultdict

import pytest
from google.protobuf.message import DecodeError

from grpc_rounds import ATTEMPT, OWN, ROUND, Raw, job, limits, model, serving, undisturbed
from polyrank.errors import FrameError
from polyrank.training.split import Refused, ServerParts, train_client_part
from polyrank.transport import InProcessLinks, ServingSettings, decode, encode
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.server_stream import ServerStream, StreamLimits
from polyrank.transport.remote.sessions import SessionId, Sessions, proof
from polyrank.transport.remote.wire import PART_BYTES, FrameAssembler, frame_parts
from polyrank.transport.serving import FrameServer

SESSION = SessionId("run", ROUND, ATTEMPT, "b")
SECRET = b"s" * 32
LIMITS = StreamLimits(credit=2, longest=1000, silence=60.0)


def changed(message: bytes, draw: random.Random) -> bytes:
    """Return a message with some bits turned, bytes put in, or taken out, or others altogether."""
    found = bytearray(message)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        how = draw.randrange(6)
        at = draw.randrange(len(found) + 1)
        if how == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif how == 1 and at < len(found):
            found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how == 2:
            found[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif how == 3:
            del found[at : at + draw.randrange(1, 9)]
        elif how == 4:
            found = found[:at]
        else:
            found += found[at:]
    return bytes(found) if draw.random() < 0.9 else draw.randbytes(draw.randrange(200))


class Recorder:
    """A handler that admits every stream, and records what comes."""

    def __init__(self):
        self.admitted, self.frames, self.byes = [], [], []

    def admit(self, stream, session):
        self.admitted.append(session)
        stream.welcome(session.client, LIMITS)
        return LIMITS

    def heard(self, stream):
        pass

    def submit(self, stream, frame):
        self.frames.append(frame)

    def bye(self, stream, failure):
        self.byes.append(failure)


def opened(handler=None):
    """Return a stream, its handler, its sessions, and the token of b's work."""
    handler, sessions = handler or Recorder(), Sessions(lambda: 0.0)
    token = sessions.issue(SESSION, 1.0)
    sessions.issue(SessionId("run", ROUND, ATTEMPT, "a"), 1.0)
    return ServerStream(handler, sessions), handler, sessions, token


def hello(token, **changes):
    first = pb.Hello.First(token=token, secret=SECRET)
    fields = {"version": 1, "run": "run", "client": "b", "round": ROUND, "attempt": ATTEMPT}
    return pb.Up(hello=pb.Hello(**{**fields, "first": first, **changes}))


def test_of_2500_changed_hellos_only_those_with_the_token_of_their_work_are_welcome():
    draw, welcome = random.Random(1), 0
    for _ in range(2500):
        stream, handler, _, token = opened()
        message = changed(hello(token).SerializeToString(), draw)
        stream.receive(message)
        if handler.admitted:
            came = pb.Up.FromString(message).hello
            assert handler.admitted == [SESSION]
            assert came.first.token == token
            welcome += 1
        assert bool(handler.admitted) == stream.welcomed
    assert 0 < welcome < 500  # bits of the secret and unknown fields may change


def test_of_2500_changed_proofs_none_is_accepted():
    draw = random.Random(2)
    for _ in range(2500):
        stream, handler, sessions, token = opened()
        sessions.redeem(SESSION, token, SECRET)
        stream.receive(hello(token, first=None, resume=pb.Hello.Resume()).SerializeToString())
        down = pb.Down.FromString(next(stream.messages()))
        right = proof(SECRET, down.challenge.nonce, SESSION)
        message = changed(pb.Up(proof=pb.Proof(hmac=right)).SerializeToString(), draw)
        stream.receive(message)
        try:
            same = pb.Up.FromString(message).proof.hmac == right
        except DecodeError:
            same = False
        assert stream.welcomed == bool(handler.admitted) == same


def test_2500_changed_messages_of_a_welcome_client_end_its_own_work_at_most():
    draw, ends = random.Random(3), 0
    good = [
        pb.Up(part=pb.Part(data=b"x" * 50, last=True)),
        pb.Up(part=pb.Part(data=b"x" * 50)),
        pb.Up(alive=pb.Alive()),
        pb.Up(bye=pb.Bye()),
    ]
    stream = None
    for _ in range(2500):
        if stream is None or stream.over:
            stream, handler, _, token = opened()
            stream.receive(hello(token).SerializeToString())
            assert stream.welcomed
        stream.receive(changed(draw.choice(good).SerializeToString(), draw))
        if stream.over:
            ends += 1
            assert len(handler.byes) == 1
            said = [pb.Down.FromString(one).WhichOneof("what") for one in stream.messages()]
            assert said == ["welcome"] if handler.byes == [None] else ["welcome", "ended"]
        assert all(len(frame) <= LIMITS.longest for frame in handler.frames)
        assert len(handler.frames) <= LIMITS.credit
    assert ends > 500


def test_2400_changed_frames_are_refused_and_the_other_client_s_adapter_is_the_same():
    """Half of them with a checksum that fits, so that more than it is put to the test."""
    draw, server = random.Random(4), model()
    made = [job("a"), job("b")]
    with ServerParts(server, [one.at_server(server) for one in made]) as server_parts:
        server_end = FrameServer(server_parts, defaultdict(limits))
        sent = frames_of("b")
        refused = accepted = 0

        def attack(times):
            nonlocal refused, accepted
            for _ in range(times):
                frame = changed(draw.choice(sent), draw)
                if draw.random() < 0.5 and len(frame) > 4:
                    frame = frame[:-4] + struct.pack("<I", zlib.crc32(frame[:-4]))
                for client, reply in server_end.answer({"b": frame}):
                    assert client == "b"
                    answer = decode(reply, limits())
                    refused += isinstance(answer, Refused)
                    accepted += not isinstance(answer, Refused)

        class Link:
            """A's requests, each after a wave of attacks."""

            def __init__(self):
                self._links = InProcessLinks(server_parts, "float32", 16, 64)
                self._link = self._links.link("a")

            def submit(self, request):
                attack(300)
                return self._link.submit(request)

            @property
            def traffic(self):
                return self._link.traffic

            def close(self):
                self._link.close()

        trained = train_client_part(model(), made[0], Link(), OWN)
        assert trained.failure is None
        assert (trained.adapter.hash(), server_parts.adapter("a").hash()) == undisturbed("a")
    assert refused + accepted == 8 * 300
    assert refused > 2000


def frames_of(client):
    """Return the frames that a client sends in an undisturbed run."""
    server, one, found = model(), job(client), []
    with ServerParts(server, [one.at_server(server)]) as server_parts:
        link = InProcessLinks(server_parts, "float32", 16, 64).link(client)
        submit = link.submit

        class Listening:
            traffic = link.traffic
            close = staticmethod(link.close)

            @staticmethod
            def submit(request):
                found.append(encode(request, limits().codec))
                return submit(request)

        assert train_client_part(model(), one, Listening(), OWN).failure is None
    return found


def test_300_changed_messages_through_the_socket_leave_the_honest_client_as_it_was():
    draw, sent = random.Random(5), frames_of("b")
    with serving([job("a"), job("b")], serve=ServingSettings(gather=0.0, credit=2)) as place:
        for _ in range(100):  # each on a stream of its own, by a stranger
            with Raw(place.access["b"]) as raw:
                good = pb.Up(hello=raw.hello(client="c")).SerializeToString()
                raw.send(changed(good, draw))
                raw.send(hello=raw.hello(client="c"))  # a second one is never due
                assert raw.refused()[0].name in ("INVALID_ARGUMENT", "UNAUTHENTICATED")
        with Raw(place.access["b"]) as raw:
            raw.send(hello=raw.hello())
            assert raw.received().WhichOneof("what") == "welcome"
            for _ in range(200):
                frame = changed(draw.choice(sent), draw)[: limits().nbytes] or b"x"
                for part in frame_parts(frame):
                    raw.send(part=part)
                assert raw.received().WhichOneof("what") == "part"
        assert place.hashes("a", place.train("a")) == undisturbed()
        assert place.server.failed("a") is None


def test_replies_that_are_not_read_count_as_credit_so_that_few_are_kept():
    stream, handler, _, token = opened()
    stream.receive(hello(token).SerializeToString())
    frame = pb.Up(part=pb.Part(data=b"x", last=True)).SerializeToString()
    for _ in range(2):
        stream.receive(frame)
        stream.reply(b"y" * 100)
    stream.receive(frame)
    assert stream.over
    assert handler.byes == ["expected at most 2 requests without reply; more came"]
    said = [pb.Down.FromString(one).WhichOneof("what") for one in stream.messages()]
    assert said == ["welcome", "part", "part", "ended"]


def test_a_reply_that_is_written_gives_its_credit_back():
    stream, handler, _, token = opened()
    stream.receive(hello(token).SerializeToString())
    written = stream.messages()
    next(written)
    frame = pb.Up(part=pb.Part(data=b"x", last=True)).SerializeToString()
    for _ in range(10):
        stream.receive(frame)
        stream.reply(b"y")
        assert pb.Down.FromString(next(written)).part.data == b"y"
    assert not stream.over
    assert len(handler.frames) == 10


def test_a_frame_in_parts_is_put_together_and_never_grows_beyond_its_bound():
    frame = random.Random(6).randbytes(2 * PART_BYTES + 3)
    assembler = FrameAssembler(len(frame))
    for _ in range(2):
        found = [assembler.add(part) for part in frame_parts(frame)]
        assert found == [None, None, frame]
    assembler = FrameAssembler(len(frame) - 1)
    first, second, last = frame_parts(frame)
    assert assembler.add(first) is None
    assert assembler.add(second) is None
    with pytest.raises(FrameError, match="expected at most"):
        assembler.add(last)
