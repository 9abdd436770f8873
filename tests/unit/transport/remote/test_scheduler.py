"""Whose frames are taken in: those of a client's newest stream, until its work is over."""

from functools import partial

import pytest

from polyrank.errors import FrameError
from polyrank.training.split import Traffic
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.scheduler import Scheduler
from polyrank.transport.remote.server_stream import ServerStream, Terms
from polyrank.transport.remote.sessions import Sessions, Work
from remote import limits

WORKS = {client: Work("run", 2, 1, client) for client in "abc"}
TERMS = Terms(credit=2, longest=100, silence=10.0)


class Idle:
    """A tail that is never asked: the bench's thread is not started."""


def seated(streams=3):
    bench = Scheduler(lambda: 0.0, streams)
    terms = dict.fromkeys("abc", TERMS)
    gathering = partial(Batcher, gather=1.0)
    bench.seat([(Idle(), "abc")], WORKS, dict.fromkeys("abc", limits()), gathering, terms, 60.0)
    return bench


def stream(bench):
    return ServerStream(bench, Sessions(lambda: 0.0))


def test_a_new_stream_takes_the_place_of_the_old_one():
    bench = seated()
    old, new = stream(bench), stream(bench)
    assert bench.enter(old, WORKS["a"]) == TERMS
    bench.add(old, b"12")
    assert bench.enter(new, WORKS["a"]) == TERMS
    assert old.over
    bench.add(old, b"345")
    bench.gone(old)
    bench.bye(old, None)
    assert bench.traffic("a") == Traffic(up=2)
    bench.add(new, b"6789")
    assert bench.traffic("a") == Traffic(up=6)
    assert not new.over


def test_nothing_is_taken_in_after_the_end_and_nobody_enters():
    bench = seated()
    one = stream(bench)
    bench.enter(one, WORKS["a"])
    bench.bye(one, "it broke a rule")
    bench.add(one, b"12")
    assert bench.traffic("a") == Traffic()
    assert bench.failed("a") == "it broke a rule"
    assert bench.enter(stream(bench), WORKS["a"]) == "it broke a rule"


def test_who_says_bye_has_not_failed():
    bench = seated()
    one = stream(bench)
    bench.enter(one, WORKS["a"])
    bench.bye(one, None)
    assert bench.failed("a") is None
    assert bench.enter(stream(bench), WORKS["a"]) == "the client has left"


def test_a_stream_of_another_round_does_not_enter():
    bench = seated()
    assert bench.enter(stream(bench), Work("run", 3, 1, "a")) == "the round has ended"
    assert bench.enter(stream(bench), Work("run", 2, 1, "d")) == "the round has ended"


def test_no_more_clients_are_connected_than_there_are_streams_for():
    bench = seated(streams=2)
    first = stream(bench)
    assert bench.enter(first, WORKS["a"]) == TERMS
    assert bench.enter(stream(bench), WORKS["b"]) == TERMS
    assert bench.enter(stream(bench), WORKS["c"]) is None
    again = stream(bench)
    assert bench.enter(again, WORKS["a"]) == TERMS  # in the place of its own
    bench.gone(again)
    assert bench.enter(stream(bench), WORKS["c"]) == TERMS


def test_unknown_clients_are_named_to_the_owner():
    with pytest.raises(FrameError, match="there is no client 'd' in this round"):
        seated().failed("d")
