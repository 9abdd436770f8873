"""Lines for the user while a round's results are awaited."""

from polyrank.remote.progress import EVERY, LEAST, AnswerProgress
from polyrank.split_server.interface import ClientStatus

NOBODY: dict[str, ClientStatus] = {}


def test_who_takes_twice_as_long_as_half_of_the_others_is_named_once():
    watch = AnswerProgress(100.0)
    for now in (110.0, 112.0, 130.0):
        watch.answered(now)
    assert watch.lines(123.9, ["slow"], NOBODY) == []
    assert watch.lines(124.0, ["slow", "slower"], NOBODY) == ["still waiting for slow, slower"]
    assert watch.lines(150.0, ["slow", "slower"], NOBODY) == []


def test_nobody_is_slow_before_as_many_have_answered_or_within_the_first_seconds():
    watch = AnswerProgress(0.0)
    watch.answered(0.1)
    assert watch.lines(60.0, ["a", "b"], NOBODY) == []
    watch = AnswerProgress(0.0)
    watch.answered(0.1)
    assert watch.lines(LEAST - 0.1, ["a"], NOBODY) == []
    assert watch.lines(LEAST, ["a"], NOBODY) == ["still waiting for a"]


def test_steps_and_bytes_of_split_clients_that_are_awaited_are_told_now_and_then():
    watch = AnswerProgress(0.0)
    status = {
        "weak": ClientStatus(True, 3, 20, 3 * 2**20, 2**19),
        "gone": ClientStatus(False, 1, 20, 0, 0),
        "done": ClientStatus(True, 20, 20, 9, 9),
    }
    assert watch.lines(EVERY - 0.1, ["weak", "gone"], status) == []
    assert watch.lines(EVERY, ["weak", "gone"], status) == [
        "gone: step 1 of 20, 0.0 MiB up, 0.0 MiB down, not connected",
        "weak: step 3 of 20, 3.0 MiB up, 0.5 MiB down",
    ]
    assert watch.lines(EVERY + 1, ["weak"], status) == []
    assert len(watch.lines(2 * EVERY, ["weak"], status)) == 1
