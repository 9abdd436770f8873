"""Who takes part: what machines answer that say hello."""

import pytest

from letters import After, Clock, Letters, Lost
from polyrank.errors import RecipeError
from polyrank.protocol import ClientPolicy
from polyrank.remote.registration import SETTLED, call
from remotes import machine, machines

WAIT = 60.0


def called(between, names=None, count=0, fits=lambda _: None, stop=lambda: None, complete=False):
    """Return the roll, and what was told meanwhile."""
    told = []
    found = call(
        between, names, count, WAIT, told.append, stop, fits, between.clock, complete=complete
    )
    return found, told


def letters(hosts, trouble=None):
    return Letters(hosts, trouble, clock=Clock())


def hosted(roll):
    return [one.client for one in roll.hosted]


def test_clients_are_found_with_their_sizes_and_no_text():
    roll, told = called(letters(machines(each=2)), names=["c0", "c1", "c2", "c3"])
    assert hosted(roll) == ["c0", "c1", "c2", "c3", "u0"]
    assert roll.homes == {"c0": 1, "c1": 1, "c2": 2, "c3": 2, "u0": 3}
    assert [one.counts["train"].rows for one in roll.hosted] == [5, 6, 7, 5, 0]
    assert "c0: 5 training examples" in told
    assert "u0: held out" in told


def test_machines_that_come_later_are_waited_for():
    between = letters(machines())
    late = {node: between.machines.pop(node) for node in (3, 4)}

    def stop():
        if between.clock.now >= 20:
            between.machines.update(late)

    for wanted in ({"names": ["c0", "c1", "c2", "c3"]}, {"count": 4}):
        roll, _ = called(between, **wanted, stop=stop)
        assert {"c2", "c3"} <= set(hosted(roll))


def test_where_no_number_is_known_all_that_come_soon_take_part():
    between = letters(machines())
    roll, _ = called(between)
    assert hosted(roll) == ["c0", "c1", "c2", "c3", "u0"]
    assert SETTLED < between.clock.now < WAIT


def test_who_does_not_come_is_named_in_time():
    between = letters(machines())
    del between.machines[2]
    with pytest.raises(RecipeError, match=r"app\.wait: after 60 s the clients \['c1'\] are not"):
        called(between, names=["c0", "c1", "c2", "c3"])
    with pytest.raises(RecipeError, match="3 of 9 clients are there"):
        called(letters(between.machines), count=9)
    with pytest.raises(RecipeError, match="0 clients are there"):
        called(letters({}))


def test_who_refused_and_who_is_silent_is_said_where_too_few_came():
    between = letters(machines(), lambda one, p: After(p, None) if one.node == 2 else p)
    with pytest.raises(RecipeError) as raised:
        called(between, count=9, fits=lambda _: "another model")
    assert "a machine takes no part: another model" in str(raised.value)
    assert "machines [2] were asked and have not answered yet" in str(raised.value)


@pytest.mark.parametrize("fits", [lambda _: None, lambda _: "another model"])
def test_where_all_machines_are_there_from_the_start_no_others_are_waited_for(fits):
    for complete, said in ((True, "simulation: . of 9 clients"), (False, r"app\.wait: after 60 s")):
        between = letters(machines())
        with pytest.raises(RecipeError, match=said):
            called(between, count=9, fits=fits, complete=complete)
        assert (between.clock.now < WAIT) == complete


def test_a_machine_that_cannot_be_reached_is_tried_again_and_not_waited_for():
    between = letters(machines())
    between.unreachable.add(1)
    roll, _ = called(between)
    assert hosted(roll) == ["c1", "c2", "c3", "u0"]
    assert between.clock.now < WAIT
    between = letters(machines())
    between.unreachable.add(1)
    roll, _ = called(between, names=["c0"], stop=lambda: between.unreachable.clear())
    assert "c0" in hosted(roll)


@pytest.mark.parametrize("wanted", [{"names": ["c0", "c2", "c3"]}, {"count": 3}, {}])
def test_a_silent_machine_does_not_hold_up_a_run_that_has_the_clients_it_wants(wanted):
    between = letters(machines(), lambda one, p: After(p, None) if one.node == 2 else p)
    roll, told = called(between, **wanted)
    assert hosted(roll) == ["c0", "c2", "c3", "u0"]
    assert told[-1] == "machines [2] take no part: they have not answered"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lambda one, p: Lost("error 2: boom") if one.node == 2 else p, "error 2: boom"),
        (lambda one, p: p[:20] if one.node == 2 else p, "packet"),
    ],
)
def test_a_machine_whose_answer_is_none_takes_no_part(trouble, reason):
    roll, told = called(letters(machines(), trouble))
    assert hosted(roll) == ["c0", "c2", "c3", "u0"]
    (line,) = [line for line in told if "takes no part" in line]
    assert line.startswith("machine 2 takes no part: ")
    assert reason in line


def test_a_machine_that_refuses_or_has_another_model_takes_no_part():
    hosts = machines() | {2: machine(["c1"], terms=ClientPolicy(smallest_count=7))}
    roll, told = called(letters(hosts))
    assert hosted(roll) == ["c0", "c2", "c3", "u0"]
    assert "machine 2 takes no part: limits.smallest_count = 7, and it has fewer" in str(told)
    asked = []
    roll, told = called(
        letters(machines()),
        fits=lambda profile: "another model" if asked.append(profile) or len(asked) == 1 else None,
    )
    assert hosted(roll) == ["c1", "c2", "c3", "u0"]
    assert "machine 1 takes no part: another model" in told
    assert {"model", "torch"} <= asked[0].versions.keys()


def test_two_machines_with_one_client_name_are_told_of_and_the_first_has_it():
    roll, told = called(letters({1: machine(["c0"]), 2: machine(["c0", "c1"])}))
    assert roll.homes == {"c0": 1, "c1": 2}
    assert hosted(roll) == ["c0", "c1"]
    assert "c0: machine 2 hosts it too, and machine 1 was first; its name must be its own" in told


def test_a_client_that_the_fleet_does_not_name_trains_not():
    roll, told = called(letters(machines()), names=["c0", "c1", "c2"])
    assert hosted(roll) == ["c0", "c1", "c2", "u0"], "who is held out needs no type"
    assert "c3: fleet.clients does not name it, so it takes no part" in told
