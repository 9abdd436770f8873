"""Which clients' frames are served together, and when."""

import pytest

from polyrank.transport.remote.batching import Batcher

ALL = ("a", "b", "c")


def batcher(gather=2.0, connected=ALL):
    made = Batcher(ALL, gather)
    for client in connected:
        made.connect(client)
    made.take()
    return made


def frames(made):
    return made.take().frames


@pytest.mark.parametrize("gather", [2.0, None])
def test_frames_are_served_at_once_when_all_have_one(gather):
    made = batcher(gather)
    assert made.wait(0.0) is None
    made.add("a", b"a0", 0.0)
    made.add("b", b"b0", 0.5)
    made.add("c", b"c0", 0.6)
    made.add("a", b"a1", 0.6)
    assert made.wait(0.6) == 0.0
    assert frames(made) == {"a": b"a0", "b": b"b0", "c": b"c0"}
    assert frames(made) == {"a": b"a1"}
    assert made.wait(9.0) is None


def test_the_first_frame_waits_no_longer_than_the_set_time():
    made = batcher()
    made.add("b", b"b0", 10.0)
    made.add("a", b"a0", 11.0)
    assert made.wait(11.0) == 1.0
    assert made.wait(12.0) == 0.0
    assert made.wait(99.0) == 0.0


def test_without_a_set_time_all_at_work_are_waited_for_connected_or_not():
    made = batcher(None, connected=("a", "b"))
    made.add("a", b"a0", 0.0)
    made.add("b", b"b0", 0.0)
    assert made.wait(1e9) is None
    made.leave("c")
    assert made.wait(0.0) == 0.0


def test_with_a_set_time_only_connected_clients_are_waited_for():
    made = batcher(connected=("a", "b"))
    made.add("a", b"a0", 0.0)
    assert made.wait(0.0) == 2.0
    made.disconnect("b")
    assert made.wait(0.0) == 0.0


def test_a_request_that_waits_at_the_server_part_counts_as_present():
    made = batcher(None)
    made.add("a", b"step", 0.0)
    made.take()
    made.set_waiting(frozenset("a"))
    assert made.wait(0.0) is None
    made.add("b", b"b0", 0.0)
    made.add("c", b"c0", 0.0)
    assert made.wait(0.0) == 0.0
    assert frames(made) == {"b": b"b0", "c": b"c0"}


def test_when_a_client_leaves_waiting_requests_are_asked_again():
    made = batcher()
    made.set_waiting(frozenset("ab"))
    assert made.wait(0.0) is None
    made.leave("c")
    assert made.wait(0.0) == 0.0
    assert frames(made) == {}
    assert made.wait(0.0) is None


def test_a_new_stream_takes_the_place_of_what_came_on_the_old_one():
    made = batcher(None)
    made.set_waiting(frozenset("a"))
    made.add("a", b"old", 0.0)
    made.connect("a")
    for client in ("b", "c"):
        made.add(client, b"x", 0.0)
    assert made.wait(0.0) is None  # a's waiting request is to be dropped: it will be sent again
    made.add("a", b"new", 1.0)
    assert made.wait(1.0) == 0.0
    taken = made.take()
    assert taken.forgotten == {"a"}
    assert taken.frames == {"a": b"new", "b": b"x", "c": b"x"}
    assert made.take().forgotten == frozenset()


def test_frames_of_a_broken_stream_are_served():
    made = batcher(connected=("a",))
    made.add("a", b"a0", 0.0)
    made.disconnect("a")
    assert made.wait(0.0) == 0.0
    assert frames(made) == {"a": b"a0"}


def test_frames_of_clients_that_have_left_are_dropped():
    made = batcher()
    made.add("a", b"a0", 0.0)
    made.leave("a")
    made.add("a", b"a1", 0.0)
    assert made.wait(9.0) is None
    assert frames(made) == {}


def test_in_turns_each_client_is_served_alone_until_its_request_waits():
    made = Batcher(("b", "a", "c"), None, turns=True)
    for client in ALL:
        made.connect(client)
    made.take()
    made.add("a", b"a0", 0.0)
    made.add("c", b"c0", 0.0)
    assert made.wait(1e9) is None, "it is the turn of b, the first that was named"
    made.add("b", b"b0", 1.0)
    made.add("b", b"b-step", 1.0)
    assert made.wait(1.0) == 0.0
    assert frames(made) == {"b": b"b0"}
    made.set_waiting(frozenset())
    assert frames(made) == {"b": b"b-step"}
    made.set_waiting(frozenset("b"))
    assert made.wait(1.0) == 0.0
    assert frames(made) == {"a": b"a0"}
    made.leave("a")
    assert made.wait(1.0) == 0.0
    assert frames(made) == {"c": b"c0"}
    made.set_waiting(frozenset())  # The step was taken.
    assert made.wait(2.0) is None, "and it is the turn of b again"


def test_a_waiting_request_that_is_sent_again_on_a_new_stream_has_its_turn_again():
    made = Batcher(ALL, None, turns=True)
    for client in ALL:
        made.connect(client)
    made.take()
    made.set_waiting(frozenset("a"))
    made.connect("a")
    made.add("b", b"b0", 0.0)
    assert made.wait(0.0) is None, "what a had sent is forgotten: it is its turn again"
    made.add("a", b"a-step", 0.0)
    taken = made.take()
    assert taken.forgotten == {"a"}
    assert taken.frames == {"a": b"a-step"}
