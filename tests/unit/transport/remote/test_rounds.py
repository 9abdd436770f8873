"""Many rounds at one server leave nothing behind: no thread, descriptor or server part."""

import gc
import logging
import threading
import time
import weakref
from pathlib import Path

import grpc

from grpc_rounds import IDENTITY, SOON, Raw, limits
from polyrank.training.split.messages import RequestId, Step, Stepped
from polyrank.transport import ServingSettings
from polyrank.transport.frames import encode
from polyrank.transport.remote import GrpcLink, SplitServer
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.sessions import SessionId, proof

ROUNDS = 50
DESCRIPTORS = Path("/proc/self/fd")


class Counted:
    """A server part without a model, that answers or raises."""

    def __init__(self, fails: bool):
        self.fails = fails

    def answer(self, requests):
        if self.fails:
            raise RuntimeError("the accelerator is gone")
        return [Stepped(one.id) for one in requests]

    def leave(self, client):
        pass


def goes_on(access):
    """Ask, and be there still when the round ends."""
    raw = Raw(access)
    raw.send(hello=raw.hello())
    raw.received()
    asks(raw)
    return raw


def asks(raw):
    """Send a frame."""
    step = Step(RequestId(raw.access.client, raw.access.round, 0, 0, 0), 1.0)
    raw.send(part=pb.Part(data=encode(step, raw.access.limits.codec), last=True))


def resumes(access):
    """Come again on a new stream."""
    raw = Raw(access)
    raw.send(hello=raw.resume())
    nonce = raw.received().challenge.nonce
    work = SessionId(access.run, access.round, access.attempt, access.client)
    raw.send(proof=pb.Proof(hmac=proof(b"s" * 32, nonce, work)))
    return raw


def breaks_off(access):
    goes_on(access).__exit__()


def says_bye(access):
    link = GrpcLink(access)
    link.submit(Step(RequestId("a", access.round, 0, 0, 0), 1.0)).result()
    link.close()


def never_comes(access):
    pass


def is_at_a_tail_that_fails(access):
    with goes_on(access) as raw:
        raw.ended()


WAYS = [goes_on, breaks_off, says_bye, never_comes, is_at_a_tail_that_fails]


def held() -> tuple[int, int]:
    """Return how many threads and descriptors this process has, once they have come to rest."""
    counts, end = [(0, 0)], time.monotonic() + SOON
    while len(counts) < 10 or len(set(counts[-10:])) > 1:
        assert time.monotonic() < end
        time.sleep(0.02)
        there = sum(not one.name.startswith("split stream") for one in threading.enumerate())
        descriptors = len([*DESCRIPTORS.iterdir()]) if DESCRIPTORS.exists() else 0
        counts.append((there, descriptors))
    return counts[-1]


def test_fifty_rounds_leave_nothing_behind(monkeypatch):
    # Ten server parts fail; pytest would keep what is logged of them, and so them.
    monkeypatch.setattr(logging.getLogger("polyrank.transport.remote.scheduler"), "disabled", True)
    server_parts, before = [], (0, 0)
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        for round in range(ROUNDS):
            way = WAYS[round % len(WAYS)]
            server_part = Counted(way is is_at_a_tail_that_fails)
            server_parts.append(weakref.ref(server_part))
            opened = server.open([(server_part, ["a"])], round, 0, {"a": limits()}, SOON)
            del server_part
            there = way(opened["a"])
            server.close()
            if there is not None:
                there.__exit__()
            if round == len(WAYS):
                before = held()
        assert held() <= before
        assert server._admission._open == {}
        pool = [one for one in threading.enumerate() if one.name.startswith("split stream")]
        assert len(pool) <= 3  # kept for the next stream
        gc.collect()
        assert [i for i, server_part in enumerate(server_parts) if server_part() is not None] in (
            [],
            [ROUNDS - 1],
        )


def test_why_a_server_part_has_failed_is_logged_and_told_to_its_owner_but_not_to_its_client(caplog):
    caplog.set_level(logging.ERROR)
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        access = server.open([(Counted(True), ["a"])], 0, 0, {"a": limits()}, SOON)["a"]
        with goes_on(access) as raw:
            assert raw.ended() == "its server part failed; the server's log says why"
        assert "the accelerator is gone" in server.failed("a")
    (record,) = [one for one in caplog.records if one.name.endswith("remote.scheduler")]
    assert record.getMessage() == "the server part of a has failed"
    assert "the accelerator is gone" in str(record.exc_info[1])


def test_no_token_and_no_secret_outlives_its_round():
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        both = [(Counted(False), ["a", "b"])]
        agreed = dict.fromkeys("ab", limits())
        old = server.open(both, 0, 0, agreed, SOON)
        with goes_on(old["a"]) as raw:
            server.close()
            assert raw.ended() == "the round has ended"
        new = server.open(both, 0, 0, agreed, SOON)  # the same work once more
        with Raw(old["b"]) as raw:
            raw.send(hello=raw.hello())
            assert raw.refused()[0] is grpc.StatusCode.UNAUTHENTICATED
        with resumes(new["a"]) as raw:
            assert raw.refused()[0] is grpc.StatusCode.NOT_FOUND
        with goes_on(new["b"]) as raw:
            assert raw.received().WhichOneof("what") == "part"


class Together(Counted):
    """Takes the step of a and b at once, and lets one wait for the other; repeats its answers."""

    taken = False

    def answer(self, requests):
        self.taken = self.taken or len(requests) == 2
        return super().answer(requests) if self.taken else [None] * len(requests)


def test_a_request_that_was_held_and_came_again_is_answered_once():
    with SplitServer("127.0.0.1:0", IDENTITY, "run", ServingSettings(gather=0.0)) as server:
        agreed = dict.fromkeys("ab", limits())
        opened = server.open([(Together(False), ["a", "b"])], 0, 0, agreed, SOON)
        with Raw(opened["a"]) as first:
            first.send(hello=first.hello())
            first.received()
            asks(first)
            end = time.monotonic() + SOON
            frame_server = server._scheduler._groups[0].server
            while not frame_server.waiting and time.monotonic() < end:
                time.sleep(0.01)
            assert frame_server.waiting == {"a"}
            with resumes(opened["a"]) as again, Raw(opened["b"]) as other:
                assert again.received().WhichOneof("what") == "welcome"
                asks(again)
                other.send(hello=other.hello())
                other.received()
                asks(other)
                assert again.received().WhichOneof("what") == "part"
                assert other.received().WhichOneof("what") == "part"
                server.close()
                assert again.received().WhichOneof("what") == "ended"
