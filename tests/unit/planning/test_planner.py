"""Plans fit their budgets, and a refused device is told what would let it in."""

from dataclasses import replace

import pytest
import torch

from models import tiny
from polyrank.errors import RecipeError
from polyrank.model import anatomy_of
from polyrank.model.describe import describe
from polyrank.planning import (
    CostModel,
    CutPoint,
    DeviceProfile,
    Fleet,
    LoRAType,
    Plan,
    Planner,
    PlanSettings,
    Workload,
    planned_fleet,
)
from polyrank.planning.sharing import ByImportance, even

WORK = Workload(batch=4, length=32, targets=16)
ROOMY = DeviceProfile("server", 2**40)
LEVELS = PlanSettings(levels=(1, 2, 4, 8))


def planner(settings: PlanSettings = LEVELS, **options: object) -> Planner:
    module = tiny("llama", num_hidden_layers=4)
    spec = describe(module)
    cost = CostModel(anatomy_of(module), spec, WORK)
    given = {"server": ROOMY, "steps": 10, "at_once": 4, **options}
    server = given.pop("server")
    assert isinstance(server, DeviceProfile)
    return Planner(spec, cost, settings, server, **given)  # type: ignore[arg-type]


def planned(plans: Planner, memory: int, **figures: float) -> Plan:
    return plans.plans({"d": DeviceProfile("d", memory, **figures)})["d"]  # type: ignore[arg-type]


def whole_at(plans: Planner, rank: int) -> int:
    """The bytes of the whole model with this rank at every site."""
    ranks = dict.fromkeys(plans.spec.shapes, rank)
    return plans.cost.memory(ranks, None).total


def test_who_can_hold_the_whole_model_at_the_top_level_is_not_cut() -> None:
    plans = planner()
    plan = planned(plans, whole_at(plans, 8))
    assert plan.feasible
    assert (plan.cut, plan.reason) == (None, "whole")
    assert plan.ranks == dict.fromkeys(plans.spec.shapes, 8)


def test_every_feasible_plan_fits_its_memory_and_uses_levels_alone() -> None:
    plans = planner()
    least = plans.cost.memory({}, CutPoint(1)).total
    for memory in range(least, whole_at(plans, 8), (whole_at(plans, 8) - least) // 12):
        plan = planned(plans, memory)
        assert plan.feasible
        assert plan.memory == plans.cost.memory(plan.ranks, plan.cut)
        assert plan.memory.total <= memory
        assert set(plan.ranks.values()) <= {1, 2, 4, 8}


def test_more_memory_never_buys_less() -> None:
    plans = planner()
    budgets = range(plans.cost.memory({}, CutPoint(1)).total, 2 * whole_at(plans, 8), 20_000)
    worth = [sum(planned(plans, memory).ranks.values()) for memory in budgets]
    assert worth == sorted(worth)
    assert worth[0] < worth[-1]


@pytest.mark.parametrize("cuts", ["best", "needed", "none"])
@pytest.mark.parametrize("missing", [1, 1000, 20_000])
def test_exactly_the_change_lets_a_refused_device_in_and_less_does_not(
    cuts: str, missing: int
) -> None:
    plans = planner(replace(LEVELS, cuts=cuts))  # type: ignore[arg-type]
    last = [s.name for s in plans.spec.sites if s.block == plans.spec.blocks - 1]
    whole = min(plans.cost.memory({site: 1}, None).total for site in last)
    least = whole if cuts == "none" else plans.cost.memory({}, CutPoint(1)).total
    memory = least - missing
    plan = planned(plans, memory)
    assert not plan.feasible
    assert f"{missing} bytes too few" in plan.reason
    assert plan.change == {"memory": least}
    assert planned(plans, least).feasible
    assert not planned(plans, memory + int(0.99 * missing)).feasible


def test_a_round_that_takes_too_long_is_refused_with_the_time_it_would_need() -> None:
    slow = {"flops": 1e6, "up": 1e4, "down": 1e4}
    plans = planner(replace(LEVELS, seconds=1e-3))
    plan = planned(plans, 2**30, **slow)
    assert not plan.feasible
    assert plan.change.keys() == {"seconds"}
    needed = plan.change["seconds"]
    assert planned(planner(replace(LEVELS, seconds=needed)), 2**30, **slow).feasible
    less = 1e-3 + 0.99 * (needed - 1e-3)
    assert not planned(planner(replace(LEVELS, seconds=less)), 2**30, **slow).feasible


def test_time_keeps_a_slow_link_from_being_cut() -> None:
    link = {"flops": 1e12, "up": 1e5, "down": 1e5}
    memory = whole_at(planner(), 1)
    assert planned(planner(), memory, **link).cut is not None
    whole = planner(replace(LEVELS, cuts="none"))
    bound = planned(whole, memory, **link).seconds.round
    plan = planned(planner(replace(LEVELS, seconds=bound)), memory, **link)
    assert plan.feasible
    assert plan.cut is None


def test_a_device_that_can_train_the_whole_model_is_cut_only_if_that_gains_ranks() -> None:
    memory = whole_at(planner(), 1)
    assert planned(planner(replace(LEVELS, cuts="needed")), memory).cut is None
    plan = planned(planner(), memory)
    assert plan.cut is not None
    assert "less for ranks" in plan.reason


def test_the_lowest_cut_and_the_u_shape_are_kept() -> None:
    memory = whole_at(planner(), 1) * 2 // 3
    assert planned(planner(replace(LEVELS, lowest_cut=2)), memory).cut == CutPoint(2)
    shaped = planned(planner(replace(LEVELS, u_shape=True)), memory).cut
    assert shaped is not None
    assert shaped.upper == 3


def test_a_tail_fits_the_servers_share() -> None:
    plans = planner()
    memory = plans.cost.memory({}, CutPoint(1)).total
    free = planned(plans, memory)
    assert set(free.ranks.values()) == {8}
    base = plans.cost.memory({}, None).weights
    share = plans.cost.server_memory(free.ranks, CutPoint(1)).total * 2 // 3
    tight = planner(server=DeviceProfile("server", base + 4 * share), at_once=4)
    plan = planned(tight, memory)
    assert plan.feasible
    assert 0 < sum(plan.ranks.values()) < sum(free.ranks.values())
    assert plans.cost.server_memory(plan.ranks, plan.cut).total <= share


def test_important_sites_get_the_ranks() -> None:
    plans = planner(replace(LEVELS, cuts="none"))
    device = DeviceProfile("d", whole_at(plans, 2))
    top = next(s.name for s in plans.spec.sites if s.name.endswith("3.mlp.up_proj"))
    gains = {site: 100.0 if site == top else 1.0 for site in plans.spec.shapes}
    plan = plans.plans({"d": device}, gains)["d"]
    assert plan.ranks[top] == 8
    assert plan.ranks[top] > min(plan.ranks.get(site, 0) for site in plans.spec.shapes)
    even_ranks = plans.plans({"d": device})["d"].ranks
    assert len(even_ranks) == len(plans.spec.sites)
    assert set(even_ranks.values()) == {2}


def test_even_ranks_rise_level_by_level() -> None:
    units, limit = {"a": 2, "b": 3, "c": 2}, {"a": 8, "b": 8, "c": 1}
    assert even(units, 7, (1, 2, 4), limit) == {"a": 1, "b": 1, "c": 1}
    assert even(units, 9, (1, 2, 4), limit) == {"a": 2, "b": 1, "c": 1}
    assert even(units, 3, (1, 2, 4), limit) == {"a": 1, "b": 0, "c": 0}


def test_derived_levels_stay_below_a_quarter_of_the_matrix() -> None:
    plans = planner(PlanSettings())
    levels = plans.rank_choices([DeviceProfile("d", 2**40)])
    assert levels == (1, 2, 4)  # The widest matrix here is 16 on its smaller side.
    assert plans.rank_choices([DeviceProfile("d", 1)]) == (1,)


def test_a_fleet_of_devices_gets_ranks_and_cuts() -> None:
    plans = planner()
    devices = {
        "small": DeviceProfile("small", plans.cost.memory({}, CutPoint(1)).total),
        "large": DeviceProfile("large", whole_at(plans, 8)),
    }
    types = {name: LoRAType(name, {"all": 1}) for name in devices}
    fleet = Fleet.table({"a": "small", "b": "large"}, types=types)
    made = planned_fleet(fleet, plans.plans(devices))
    assert made.cuts == {"small": CutPoint(1)}
    assert made.ranks(plans.spec)["b"] == dict.fromkeys(plans.spec.shapes, 8)
    poor = {**devices, "small": DeviceProfile("small", 1000)}
    with pytest.raises(RecipeError, match="small: memory: the least that can be trained"):
        planned_fleet(fleet, plans.plans(poor))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": ()}, "plan.levels"),
        ({"levels": (2, 1)}, "plan.levels"),
        ({"cuts": "all"}, "plan.cuts"),
        ({"lowest_cut": 0}, "plan.lowest_cut"),
        ({"seconds": -1.0}, "plan.seconds"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PlanSettings(**settings)  # type: ignore[arg-type]


def test_planning_needs_no_weights() -> None:
    module = tiny("llama", num_hidden_layers=4)
    with torch.device("meta"):
        bare = type(module)(module.config)
    spec = describe(module)
    one, other = (CostModel(anatomy_of(m), spec, WORK) for m in (module, bare))
    ranks = dict.fromkeys(spec.shapes, 3)
    assert one.memory(ranks, CutPoint(2)) == other.memory(ranks, CutPoint(2))


def test_a_server_that_cannot_hold_base_and_tails_cuts_nobody() -> None:
    last = replace(LEVELS, lowest_cut=3)
    plans = planner(last)
    own = [site.name for site in plans.spec.sites if site.block == 2]
    memory = min(plans.cost.memory({site: 1}, CutPoint(3)).total for site in own)
    base = plans.cost.memory({}, None).weights
    has = base + 4 * plans.cost.server_memory({}, CutPoint(3)).total - 100
    refused = planned(planner(last, server=DeviceProfile("server", has)), memory)
    assert not refused.feasible
    assert refused.reason.startswith("server: the base and the tails of 4 clients need")
    assert refused.change == {"server": has + 100}
    enough = planned(planner(last, server=DeviceProfile("server", has + 100)), memory)
    assert (enough.feasible, enough.cut) == (True, CutPoint(3))
    assert not planned(planner(last, server=DeviceProfile("server", has + 99)), memory).feasible
    whole = planned(planner(last, server=DeviceProfile("server", has)), whole_at(plans, 2))
    assert (whole.feasible, whole.cut) == (True, None)


def test_no_cut_at_all_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(RecipeError, match=r"plan\.lowest_cut: 4 of 4 blocks"):
        planner(replace(LEVELS, lowest_cut=4))
    with pytest.raises(RecipeError, match=r"plan\.lowest_cut: 3 of 4 blocks.*U-shape"):
        planner(replace(LEVELS, lowest_cut=3, u_shape=True))
    assert planner(replace(LEVELS, lowest_cut=4, cuts="none"))


def test_levels_above_every_matrix_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"plan\.levels: the smallest, 17"):
        planned(planner(PlanSettings(levels=(17,))), 2**40)


def deep(settings: PlanSettings = LEVELS, **load: object) -> Planner:
    """A planner of 40 blocks, of which not every cut is tried at first."""
    module = tiny("llama", num_hidden_layers=40)
    spec = describe(module)
    cost = CostModel(anatomy_of(module), spec, replace(WORK, **load))  # type: ignore[arg-type]
    return Planner(spec, cost, settings, ROOMY, steps=10, at_once=4)


def test_of_plans_worth_the_same_that_with_the_most_blocks_at_the_client_is_taken() -> None:
    """Behind an unlimited server all ranks are the largest: what is left decides the cut."""
    plans = deep(scored=True)  # Fewer depths to try, so quicker.
    full = dict.fromkeys(plans.spec.shapes, 8)
    for lower in (5, 17, 30):
        device = DeviceProfile("d", plans.cost.memory(full, CutPoint(lower)).total)
        assert plans.plans({"d": device})["d"].cut == CutPoint(lower)
        gains = {site: 1.0 / (3 + i) for i, site in enumerate(plans.spec.shapes)}
        plan = plans.plans({"d": device}, gains)["d"]
        assert plan.cut == CutPoint(lower), "sums of the same numbers in another order are the same"


def test_where_scoring_goes_down_to_the_first_block_plans_fit_that() -> None:
    plain, scored = deep(), deep(scored=True)
    device = DeviceProfile("d", plain.cost.memory(dict.fromkeys(plain.spec.shapes, 2), None).total)
    less, more = (plans.plans({"d": device})["d"] for plans in (scored, plain))
    assert less.memory.total <= device.memory_bytes
    assert less.memory == scored.cost.memory(less.ranks, less.cut)
    assert less.cut is not None
    assert less.cut.lower < (more.cut.lower if more.cut else 40)


def test_checkpointed_plans_fill_their_budget_too() -> None:
    """There the block that is computed again takes the most, so that ranks cost more together."""
    plans = deep(replace(LEVELS, cuts="none"), checkpointing=True)
    device = DeviceProfile("d", plans.cost.memory(dict.fromkeys(plans.spec.shapes, 2), None).total)
    gains = {site.name: 9.0 if site.block == 20 else 1.0 for site in plans.spec.sites}
    plan = plans.plans({"d": device}, gains)["d"]
    assert plan.feasible
    assert 0.9 * device.memory_bytes < plan.memory.total <= device.memory_bytes


def test_sites_without_a_score_count_as_the_least_important() -> None:
    known = ByImportance({"a": 5.0, "b": 1.0})
    assert known.worth({"a": 2, "b": 1, "c": 4}) == (15.0, 0.0)
    units, limit = dict.fromkeys("abc", 1), dict.fromkeys("abc", 8)
    assert known.ranks(units, 10, (2, 8), limit) == {"a": 8, "b": 2, "c": 0}


def test_one_set_at_the_server_has_one_rank_per_site() -> None:
    module = tiny("llama", num_hidden_layers=4)
    spec = describe(module)
    cost = CostModel(anatomy_of(module), spec, WORK)
    base, tail = cost.memory({}, None).weights, dict.fromkeys(spec.shapes, 2)
    server = DeviceProfile("server", base + 4 * cost.server_memory(tail, CutPoint(1)).total)
    full = dict.fromkeys(spec.shapes, 8)
    budgets = {"d1": cost.memory({}, CutPoint(1)).total, "d2": cost.memory(full, CutPoint(2)).total}
    heads = {name: DeviceProfile(name, memory) for name, memory in budgets.items()}
    top = {s.name for s in spec.sites if s.block >= 2}
    found = {}
    for shared in (False, True):
        made = Planner(spec, cost, LEVELS, server, steps=1, at_once=4, shared=shared).plans(heads)
        assert {name: plan.cut for name, plan in made.items()} == {
            "d1": CutPoint(1),
            "d2": CutPoint(2),
        }
        found[shared] = [{s: made[d].ranks.get(s, 0) for s in top} for d in sorted(made)]
    assert found[True][0] == found[True][1]
    assert found[False][0] != found[False][1]
