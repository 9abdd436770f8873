"""Clients' own devices are planned within their limits; who cannot take part is left out."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import plannings
from federations import SITES, clients
from memory_channel import MemoryChannel
from models import tiny, write_tiny
from polyrank.config.app import AppSettings
from polyrank.config.reading import checked
from polyrank.errors import RecipeError
from polyrank.model import anatomy_of
from polyrank.model.describe import describe
from polyrank.planning import (
    CostModel,
    CutPoint,
    DeviceProfile,
    Limits,
    Planner,
    PlanSettings,
    Workload,
)
from polyrank.planning.sharing import BySpectrum
from polyrank.protocol.client_info import ClientPolicy, read_node_info
from polyrank.remote.admission import admit
from polyrank.remote.parts import RemoteParts
from polyrank.remote.registration import ClientRegistry, work_of
from polyrank.run.planning import Importance
from polyrank.runner.parts import Invocation
from polyrank.runner.runner import complete
from polyrank.split_server.host import ServerPartHost
from polyrank.split_server.settings import HostedModel, SplitServerSettings
from remote_federations import OnDisk, machines, train_requests

MODULE = tiny("llama", num_hidden_layers=4)
SPEC = describe(MODULE)
COST = CostModel(anatomy_of(MODULE), SPEC, Workload(batch=4, length=32, targets=16))
ROOMY = DeviceProfile("server", 2**40)
LEVELS = PlanSettings(levels=(1, 2, 4, 8))
FULL = COST.memory(dict.fromkeys(SPEC.shapes, 8), None).total
HEADS = {lower: COST.memory({}, CutPoint(lower)).total for lower in (1, 2, 3)}
BLOCK = {site.name: site.block for site in SPEC.sites}


def planner(chosen=LEVELS, server=ROOMY, *, shared=False):
    return Planner(SPEC, COST, chosen, server, steps=10, at_once=4, shared=shared)


def plan(memory, limits, chosen=LEVELS, known=None):
    devices = {"d": DeviceProfile("d", memory)}
    return planner(chosen).plans(devices, known, {"d": limits})["d"]


def own(plan):
    """The ranks that the device itself trains."""
    blocks = range(4) if plan.cut is None else plan.cut.at_client(4)
    return {site: rank for site, rank in plan.ranks.items() if BLOCK[site] in blocks}


def assert_within(plan, limits):
    if limits.largest_rank is not None:
        assert max(own(plan).values(), default=0) <= limits.largest_rank
    if plan.cut is not None:
        assert plan.cut.lower >= (limits.lowest_cut or 1)
        assert limits.labels_may_leave or plan.cut.upper == 3


LIMITS = st.builds(
    Limits,
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 5),
    st.booleans(),
)
MEMORY = st.integers(HEADS[1] // 2, FULL)
SETTINGS = st.builds(
    PlanSettings,
    levels=st.sampled_from([None, (1, 2, 4, 8), (3, 6), (8,)]),
    cuts=st.sampled_from(["best", "needed", "none"]),
    u_shape=st.booleans(),
    lowest_cut=st.integers(1, 2),
)
KNOWN = st.sampled_from(
    [
        None,
        {site: 1.0 + number for number, site in enumerate(SPEC.shapes)},
        BySpectrum(dict.fromkeys(SPEC.shapes, (3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2))),
    ]
)


@settings(max_examples=40, deadline=None)
@given(MEMORY, LIMITS, SETTINGS, KNOWN)
def test_no_plan_goes_beyond_the_limits_or_the_memory(memory, limits, chosen, known):
    made = plan(memory, limits, chosen, known)
    if made.feasible:
        assert_within(made, limits)
        assert made.memory.total <= memory
        assert made.ranks


@settings(max_examples=25, deadline=None)
@given(st.lists(MEMORY, min_size=1, max_size=3), SETTINGS, LIMITS)
def test_limits_of_one_device_change_no_plan_of_the_others(memories, chosen, limits):
    devices = {f"d{i}": DeviceProfile(f"d{i}", memory) for i, memory in enumerate(memories)}
    chosen = replace(chosen, levels=chosen.levels or (1, 2, 4))  # Derived, they are all devices'.
    alone = planner(chosen).plans(devices)
    beside = {**devices, "other": DeviceProfile("other", FULL)}
    found = planner(chosen).plans(beside, None, {"other": limits, "d0": Limits()})
    assert {name: found[name] for name in devices} == alone


@settings(max_examples=25, deadline=None)
@given(MEMORY, LIMITS, SETTINGS)
def test_a_refusal_says_a_change_that_lets_the_device_in(memory, limits, chosen):
    made = plan(memory, limits, chosen)
    if made.feasible:
        return
    assert made.reason
    if made.change:
        assert plan(int(made.change["memory"]), limits, chosen).feasible
    _, with_, told = made.reason.partition("it could take part with ")
    if with_:
        changed = limits
        for one in told.split(", "):
            key, _, value = one.removeprefix("limits.").partition(" = ")
            changed = replace(changed, **{key: json.loads(value)})
        let_in = plan(memory, changed, chosen)
        assert let_in.feasible
        if changed.lowest_cut != limits.lowest_cut:
            less = replace(changed, lowest_cut=changed.lowest_cut + 1)
            assert not plan(memory, less, chosen).feasible


def test_a_refusal_names_the_limit_alone_that_keeps_a_device_out():
    assert plan(HEADS[1], Limits(16, None, False)).reason.endswith(
        "it could take part with limits.labels_may_leave = true"
    )
    deeper = plan(HEADS[2], Limits(lowest_cut=3))
    assert deeper.reason.endswith("it could take part with limits.lowest_cut = 2")
    assert deeper.change == {"memory": HEADS[3]}
    whole = plan(FULL, Limits(largest_rank=3), PlanSettings(levels=(4,), cuts="none"))
    assert not whole.change
    assert "limits: they leave it nothing to train" in whole.reason
    assert whole.reason.endswith("it could take part with limits.largest_rank = 4")
    poor = plan(1000, Limits(largest_rank=3), PlanSettings(levels=(4,), cuts="none"))
    assert "nor could it without them: memory: the least" in poor.reason


def test_derived_levels_do_not_go_beyond_the_largest_rank_of_the_richest():
    poor, rich = DeviceProfile("poor", FULL // 2), DeviceProfile("rich", 2**40)
    made = planner(PlanSettings())
    assert made.rank_choices([poor, rich]) == made.rank_choices([poor, rich], [Limits(), Limits()])
    assert made.rank_choices([poor, rich], [Limits(), Limits(3)]) == (1, 2)
    assert made.rank_choices([rich, rich], [Limits(1), Limits(2)]) == (1, 2)


def test_the_server_keeps_what_some_plan_may_come_to_have():
    """Behind a cut the top of Q; where only clients train, their largest rank."""
    device = [DeviceProfile("d", FULL)] * 2
    whole = planner(replace(LEVELS, cuts="none"))
    assert set(whole.largest(device, [Limits(2), Limits(3)]).values()) == {3}
    assert set(whole.largest(device, [Limits(2), Limits()]).values()) == {8}
    cut = planner(replace(LEVELS, lowest_cut=2)).largest(device, [Limits(2), Limits(2)])
    assert {BLOCK[site]: rank for site, rank in cut.items()} == {0: 2, 1: 2, 2: 8, 3: 8}
    shaped = planner().largest(device, [Limits(2, 2, False), Limits(2, 3)])
    assert {BLOCK[site]: rank for site, rank in shaped.items()} == {0: 2, 1: 2, 2: 8, 3: 8}
    shaped = planner().largest(device, [Limits(2, 2, False)] * 2)
    assert {BLOCK[site]: rank for site, rank in shaped.items()} == {0: 2, 1: 2, 2: 8, 3: 2}


def test_one_set_at_the_server_has_one_rank_per_site_within_all_limits():
    base, tail = COST.memory({}, None).weights, dict.fromkeys(SPEC.shapes, 2)
    server = DeviceProfile("server", base + 4 * COST.server_memory(tail, CutPoint(1)).total)
    devices = {name: DeviceProfile(name, HEADS[3]) for name in ("deep", "shaped", "free")}
    limits = {"deep": Limits(1, 3), "shaped": Limits(labels_may_leave=False)}
    made = planner(server=server, shared=True).plans(devices, None, limits)
    cuts = {name: one.cut for name, one in made.items() if one.feasible}
    assert len(cuts) >= 2
    assert None not in cuts.values()
    for site in SPEC.shapes:
        ranks = {
            made[name].ranks.get(site, 0)
            for name, cut in cuts.items()
            if cut is not None and BLOCK[site] in cut.at_server(4)
        }
        assert len(ranks) <= 1


# --- in a run's planning ---


def test_plans_that_are_made_anew_keep_the_limits():
    limits = {"station": Limits(largest_rank=2), "phone": Limits(labels_may_leave=False)}
    free = plannings.planning()
    head = free.planner.cost.memory({}, CutPoint(1, 2)).total
    devices = {**free.devices, "phone": replace(free.devices["phone"], memory_bytes=head + 1500)}
    made = replace(free, devices=devices, limits=limits)
    first, *others = made.planner.spec.shapes
    scores = {**dict.fromkeys(others, 1.0), first: 9.0}
    for known in (Importance(), Importance(scores, scores)):
        found = made.planned(known)
        assert max(found.plans["station"].ranks.values()) == 2
        assert found.fleet.cuts == {"phone": CutPoint(1, 2)}
    assert replace(made, limits={}).planned(known).plans["station"].ranks[first] == 4
    assert made.described()["limits"]["station"]["largest_rank"] == 2
    assert "limits" not in free.described()


def test_one_plan_for_all_keeps_the_limits_of_all():
    made = plannings.planning(force="station", limits={"phone": Limits(largest_rank=2)})
    devices = dict.fromkeys(made.devices, made.devices["station"])
    found = replace(made, devices=devices).planned(Importance())
    assert max(max(one.ranks.values()) for one in found.plans.values()) == 2


# --- clients with devices of their own ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=4)


def recipe_of(folder, **more):
    plan = {"levels": [1, 2, 4], "cuts": "needed", "every": 1, "threshold": 0.0}
    content = {
        "name": "own",
        "rounds": 2,
        "model": {"source": str(folder), "sites": [*SITES], "device": "cpu"},
        "data": {"source": "client"},
        "plan": plan,
        "local": {"lr": 0.02, "batch": 2, "steps": 2},
        "evaluation": {"every": 0, "examples": 1, "own_rank": False, "generate": 0},
        "split": {"wire": "float32"},
        "engine": {"threads": 1},
        **more,
    }
    return checked(content, "recipe")


def hosts(folder, devices, policies=None):
    """Machines of c0, c1, …, one of the held-out u0, with these devices and policies."""
    data = clients(seen=4)
    recipe = recipe_of(folder)
    made = machines(
        data,
        model=OnDisk(folder, [*SITES]),
        local=recipe.local,
        evaluation=recipe.evaluation,
        split=recipe.split,
    )
    named = dict(enumerate(sorted(data), 1))
    return {
        node: replace(
            host,
            device=devices.get(named[node]),
            policy=(policies or {}).get(named[node], ClientPolicy()),
        )
        for node, host in made.items()
    }


def registry_of(channel):
    registry = ClientRegistry()
    for node in channel.nodes():
        registry.register(node, read_node_info(channel.machines[node].answer("hello", b"")))
    return registry


def admitted(folder, own, policies=None, **more):
    recipe = recipe_of(folder, **more)
    registry = registry_of(MemoryChannel(hosts(folder, own, policies)))
    return admit(recipe, registry, recipe.model.load_bare())


def budgets(folder):
    """Bytes of a head of one block, of one in a U-shape, and of the whole model, by the planner."""
    roomy = {f"c{i}": DeviceProfile("any", 2**40) for i in range(4)}
    recipe, found = recipe_of(folder), admitted(folder, roomy)
    work = {client.name: work_of(client) for client in found.registry.clients}
    cost = found.planning(recipe, recipe.model.load_bare(), work).planner.cost
    least = [cost.memory({}, cut).total for cut in (CutPoint(1), CutPoint(1, 3))]
    return [*least, cost.memory(dict.fromkeys(cost.spec.shapes, 4), None).total]


class Follower:
    """Follows a run and says nothing."""

    def __getattr__(self, name):
        return lambda *_: None


def test_a_run_with_the_clients_own_devices(folder, tmp_path, monkeypatch):
    """One is cut, one cut in a U-shape, one whole at a small rank, and one is too small."""
    head, shaped, whole = budgets(folder)
    devices = {
        "c0": DeviceProfile("c0", shaped + 2000),
        "c1": DeviceProfile("c1", 4 * whole),
        "c2": DeviceProfile("c2", head // 2),
        "c3": DeviceProfile("c3", head + 2000),
    }
    policies = {"c0": ClientPolicy(labels_may_leave=False), "c1": ClientPolicy(largest_rank=2)}
    recipe, told = recipe_of(folder), []
    channel = MemoryChannel(hosts(folder, devices, policies), together=4)
    hosted = HostedModel(str(folder), 1, device="cpu", sites=[*SITES])
    settings = SplitServerSettings(hosted, "run", recipe.split, threads=1)
    monkeypatch.setattr(RemoteParts, "tell", lambda _, line: told.append(line))
    with ExitStack() as held:
        split_server = ServerPartHost(settings)
        held.callback(split_server.stop)
        monkeypatch.setattr(RemoteParts, "_split_server", lambda *_: split_server)
        invocation = Invocation(Follower(), lambda: False)
        parts = RemoteParts(
            recipe,
            AppSettings(clients=4, wait=5.0),
            channel,
            "run",
            invocation,
            Console(quiet=True),
        )
        result = complete(recipe, tmp_path / "run", invocation, parts, resume=False)
    assert result.summary["rounds"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    (line,) = [line for line in told if line.startswith("c2 takes no part: ")]
    assert "memory: the least that can be trained (cut at 1) needs" in line
    fleet = json.loads((tmp_path / "run" / "fleet.json").read_text())
    assert fleet["clients"] == {id: id for id in ("c0", "c1", "c3")}
    assert fleet["cuts"] == {"c0": [1, 3], "c3": 1}
    assert list(fleet["left_out"]) == ["c2"]
    assert fleet["left_out"]["c2"] in line
    records = [
        json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    ]
    for record in records:
        assert record["rejected"] == {}
        assert record["cuts"] == {"1": 1, "1–3": 1, "whole": 1}
    tasks = [request.task for request in train_requests(channel)]
    assert sorted({task.client for task in tasks}) == ["c0", "c1", "c3"]
    assert len(tasks) == 6
    assert {max(task.assignment.ranks.values()) for task in tasks if task.client == "c1"} == {2}
    assert {task.cut for task in tasks if task.client == "c0"} == {CutPoint(1, 3)}


def test_a_client_without_a_device_is_left_out_and_sent_to_its_client_toml(folder):
    roomy = DeviceProfile("any", 2**40)
    found = admitted(folder, {"c0": roomy, "c3": roomy})
    assert found.fleet.assigned == {"c0": "c0", "c3": "c3"}
    assert sorted(found.registry.node_of) == ["c0", "c3", "u0"]
    assert sorted(found.left_out) == ["c1", "c2"]
    assert "client.toml has no [device]" in found.left_out["c1"]
    assert found.devices["c3"] == DeviceProfile("c3", 2**40)


def test_nobody_who_can_take_part_is_an_error_with_every_reason(folder):
    with pytest.raises(
        RecipeError, match=r"no client can take part:\n  c0: memory.*\n  c1: its cl"
    ):
        admitted(folder, {"c0": DeviceProfile("c0", 1000)})
    with pytest.raises(
        RecipeError, match=r"no client can take part:\n  c0: its client.toml has no"
    ):
        admitted(folder, {})


def test_devices_that_the_recipe_gives_count_and_limits_bind_whom_they_are_of(folder):
    *_, whole = budgets(folder)
    given = {"devices": {"box": {"memory": 4 * whole}}, "fleet": {"distribution": {"box": 1.0}}}
    small = dict.fromkeys(["c0", "c1"], DeviceProfile("any", 1000))
    free = admitted(folder, small, **given)
    assert set(free.fleet.assigned.values()) == {"box"}
    assert not free.left_out
    assert not free.limits
    found = admitted(folder, small, {"c1": ClientPolicy(largest_rank=2)}, **given)
    names = {"c0": "box", "c1": "box, c1", "c2": "box", "c3": "box"}
    assert found.fleet.assigned == names
    recipe = recipe_of(folder, **given)
    work = {client.name: work_of(client) for client in found.registry.clients}
    plans = found.planning(recipe, recipe.model.load_bare(), work).plans(Importance())
    assert {name: max(one.ranks.values()) for name, one in plans.items()} == {
        "box": 4,
        "box, c1": 2,
    }
    only = {**given, "fleet": {"distribution": {"box": 1.0}, "force": "weakest"}}
    forced = admitted(folder, small, {"c1": ClientPolicy(largest_rank=2)}, **only)
    plans = forced.planning(recipe_of(folder, **only), recipe.model.load_bare(), work)
    assert max(plans.planned(Importance()).plans["box"].ranks.values()) == 2


def test_a_recipe_may_leave_the_fleet_to_clients_with_devices_of_their_own_alone(folder):
    assert recipe_of(folder).devices_of_clients
    assert recipe_of(folder, fleet={"force": "weakest"}).devices_of_clients
    with pytest.raises(RecipeError, match="give either distribution"):
        recipe_of(folder, data={"source": "tasks.jsonl"})
    with pytest.raises(RecipeError, match=r"fleet\.redraw: has no meaning where every client"):
        recipe_of(folder, fleet={"redraw": 2})
    with pytest.raises(RecipeError, match=r"fleet\.types: with \[plan\]"):
        recipe_of(folder, fleet={"types": {"T1": 2}})
