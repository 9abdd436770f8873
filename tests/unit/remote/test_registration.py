"""Which clients take part, by what their machines answer."""

import pytest

from memory_channel import After, Clock, MemoryChannel, NoReply
from polyrank.errors import RecipeError
from polyrank.protocol.client_info import ClientPolicy
from polyrank.remote.registration import SETTLED, discover
from remote_federations import machine, machines

WAIT = 60.0


def discovered(channel, names=None, count=0, fits=lambda _: None, stop=lambda: None):
    """Return the registry, and what was told meanwhile."""
    told = []
    found = discover(channel, names, count, WAIT, told.append, stop, fits, channel.clock)
    return found, told


def channel_to(hosts, trouble=None, **rest):
    return MemoryChannel(hosts, trouble, clock=Clock(), **rest)


def names_in(registry):
    return [client.name for client in registry.clients]


def test_clients_are_found_with_their_sizes_and_no_text():
    registry, told = discovered(channel_to(machines(each=2)), names=["c0", "c1", "c2", "c3"])
    assert names_in(registry) == ["c0", "c1", "c2", "c3", "u0"]
    assert registry.node_of == {"c0": 1, "c1": 1, "c2": 2, "c3": 2, "u0": 3}
    assert [client.counts["train"].rows for client in registry.clients] == [5, 6, 7, 5, 0]
    assert "c0: 5 training examples" in told
    assert "u0: held out" in told


def test_machines_that_come_later_are_waited_for():
    channel = channel_to(machines())
    late = {node: channel.machines.pop(node) for node in (3, 4)}

    def stop():
        if channel.clock.now >= 20:
            channel.machines.update(late)

    for wanted in ({"names": ["c0", "c1", "c2", "c3"]}, {"count": 4}):
        registry, _ = discovered(channel, **wanted, stop=stop)
        assert {"c2", "c3"} <= set(names_in(registry))


def test_where_no_number_is_known_all_that_come_soon_take_part():
    channel = channel_to(machines())
    registry, _ = discovered(channel)
    assert names_in(registry) == ["c0", "c1", "c2", "c3", "u0"]
    assert SETTLED < channel.clock.now < WAIT


def test_who_does_not_come_is_named_in_time():
    channel = channel_to(machines())
    del channel.machines[2]
    with pytest.raises(RecipeError, match=r"app\.wait: after 60 s the clients \['c1'\] are not"):
        discovered(channel, names=["c0", "c1", "c2", "c3"])
    with pytest.raises(RecipeError, match="3 of 9 clients are there"):
        discovered(channel_to(channel.machines), count=9)
    with pytest.raises(RecipeError, match="0 clients are there"):
        discovered(channel_to({}))


def test_who_refused_and_who_is_silent_is_said_where_too_few_came():
    channel = channel_to(machines(), lambda one, p: After(p, None) if one.node == 2 else p)
    with pytest.raises(RecipeError) as raised:
        discovered(channel, count=9, fits=lambda _: "another model")
    assert "a machine takes no part: another model" in str(raised.value)
    assert "machines [2] were asked and have not answered yet" in str(raised.value)


@pytest.mark.parametrize("fits", [lambda _: None, lambda _: "another model"])
def test_where_all_machines_are_there_from_the_start_no_others_are_waited_for(fits):
    for simulated, said in (
        (True, "simulation: . of 9 clients"),
        (False, r"app\.wait: after 60 s"),
    ):
        channel = channel_to(machines(), simulated=simulated)
        with pytest.raises(RecipeError, match=said[simulated]):
            discovered(channel, count=9, fits=fits)
        assert (channel.clock.now < WAIT) == simulated


def test_a_machine_that_cannot_be_reached_is_tried_again_and_not_waited_for():
    channel = channel_to(machines())
    channel.unreachable.add(1)
    registry, _ = discovered(channel)
    assert names_in(registry) == ["c1", "c2", "c3", "u0"]
    assert channel.clock.now < WAIT
    channel = channel_to(machines())
    channel.unreachable.add(1)
    registry, _ = discovered(channel, names=["c0"], stop=lambda: channel.unreachable.clear())
    assert "c0" in names_in(registry)


@pytest.mark.parametrize("wanted", [{"names": ["c0", "c2", "c3"]}, {"count": 3}, {}])
def test_a_silent_machine_does_not_hold_up_a_run_that_has_the_clients_it_wants(wanted):
    channel = channel_to(machines(), lambda one, p: After(p, None) if one.node == 2 else p)
    registry, told = discovered(channel, **wanted)
    assert names_in(registry) == ["c0", "c2", "c3", "u0"]
    assert told[-1] == "machines [2] take no part: they have not answered"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lambda one, p: NoReply("error 2: boom") if one.node == 2 else p, "error 2: boom"),
        (lambda one, p: p[:20] if one.node == 2 else p, "packet"),
    ],
)
def test_a_machine_whose_answer_is_none_takes_no_part(trouble, reason):
    registry, told = discovered(channel_to(machines(), trouble))
    assert names_in(registry) == ["c0", "c2", "c3", "u0"]
    (line,) = [line for line in told if "takes no part" in line]
    assert line.startswith("machine 2 takes no part: ")
    assert reason in line


def test_a_machine_that_refuses_or_has_another_model_takes_no_part():
    hosts = machines() | {2: machine(["c1"], policy=ClientPolicy(smallest_count=7))}
    registry, told = discovered(channel_to(hosts))
    assert names_in(registry) == ["c0", "c2", "c3", "u0"]
    assert "machine 2 takes no part: limits.smallest_count = 7, and it has fewer" in str(told)
    asked = []
    registry, told = discovered(
        channel_to(machines()),
        fits=lambda node: "another model" if asked.append(node) or len(asked) == 1 else None,
    )
    assert names_in(registry) == ["c1", "c2", "c3", "u0"]
    assert "machine 1 takes no part: another model" in told
    assert {"model", "torch"} <= asked[0].versions.keys()


def test_two_machines_with_one_client_name_are_told_of_and_the_first_has_it():
    registry, told = discovered(channel_to({1: machine(["c0"]), 2: machine(["c0", "c1"])}))
    assert registry.node_of == {"c0": 1, "c1": 2}
    assert names_in(registry) == ["c0", "c1"]
    assert "c0: machine 2 hosts it too, and machine 1 was first; its name must be its own" in told


def test_a_client_that_the_fleet_does_not_name_trains_not():
    registry, told = discovered(channel_to(machines()), names=["c0", "c1", "c2"])
    assert names_in(registry) == ["c0", "c1", "c2", "u0"], "who is held out needs no type"
    assert "c3: fleet.clients does not name it, so it takes no part" in told
