"""Frames are accepted from a client's newest stream, until its work has ended."""

from functools import partial

import pytest

from grpc_rounds import limits
from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.scheduler import Scheduler
from polyrank.transport.remote.server_stream import ServerStream, StreamLimits
from polyrank.transport.remote.sessions import SessionId, Sessions

SESSIONS = {client: SessionId("run", 2, 1, client) for client in "abc"}
LIMITS = StreamLimits(credit=2, longest=100, silence=10.0)


class Idle:
    """A server part that is never asked: the scheduler's thread is not started."""


def started(streams=3):
    scheduler = Scheduler(lambda: 0.0, streams)
    stream_limits = dict.fromkeys("abc", LIMITS)
    batcher = partial(Batcher, gather=1.0)
    scheduler.start_round(
        [(Idle(), "abc")], SESSIONS, dict.fromkeys("abc", limits()), stream_limits, batcher, 60.0
    )
    return scheduler


def stream(scheduler):
    return ServerStream(scheduler, Sessions(lambda: 0.0))


def test_a_new_stream_takes_the_place_of_the_old_one():
    scheduler = started()
    old, new = stream(scheduler), stream(scheduler)
    assert scheduler.admit(old, SESSIONS["a"]) == LIMITS
    scheduler.submit(old, b"12")
    assert scheduler.admit(new, SESSIONS["a"]) == LIMITS
    assert old.over
    scheduler.submit(old, b"345")
    scheduler.disconnected(old)
    scheduler.bye(old, None)
    assert scheduler.traffic("a") == WireBytes(up=2)
    scheduler.submit(new, b"6789")
    assert scheduler.traffic("a") == WireBytes(up=6)
    assert not new.over


def test_after_the_end_no_frame_is_accepted_and_no_stream_admitted():
    scheduler = started()
    one = stream(scheduler)
    scheduler.admit(one, SESSIONS["a"])
    scheduler.bye(one, "it broke a rule")
    scheduler.submit(one, b"12")
    assert scheduler.traffic("a") == WireBytes()
    assert scheduler.failed("a") == "it broke a rule"
    assert scheduler.admit(stream(scheduler), SESSIONS["a"]) == "it broke a rule"


def test_a_client_that_says_bye_has_not_failed():
    scheduler = started()
    one = stream(scheduler)
    scheduler.admit(one, SESSIONS["a"])
    scheduler.bye(one, None)
    assert scheduler.failed("a") is None
    assert scheduler.admit(stream(scheduler), SESSIONS["a"]) == "the client has left"


def test_a_stream_of_another_round_is_not_admitted():
    scheduler = started()
    assert scheduler.admit(stream(scheduler), SessionId("run", 3, 1, "a")) == "the round has ended"
    assert scheduler.admit(stream(scheduler), SessionId("run", 2, 1, "d")) == "the round has ended"


def test_no_more_clients_are_connected_than_there_are_streams_for():
    scheduler = started(streams=2)
    first = stream(scheduler)
    assert scheduler.admit(first, SESSIONS["a"]) == LIMITS
    assert scheduler.admit(stream(scheduler), SESSIONS["b"]) == LIMITS
    assert scheduler.admit(stream(scheduler), SESSIONS["c"]) is None
    again = stream(scheduler)
    assert scheduler.admit(again, SESSIONS["a"]) == LIMITS  # in the place of its own
    scheduler.disconnected(again)
    assert scheduler.admit(stream(scheduler), SESSIONS["c"]) == LIMITS


def test_unknown_clients_are_named_to_the_owner():
    with pytest.raises(FrameError, match="there is no client 'd' in this round"):
        started().failed("d")
