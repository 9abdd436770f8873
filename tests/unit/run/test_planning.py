"""Plans in a run: made anew once importance has moved, without changing what was learnt."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import federations
import plannings
from plannings import CONDUCT, LOCAL, deep, opened, planning
from polyrank.algebra import Adapter
from polyrank.data import sizes
from polyrank.data.types import Example
from polyrank.errors import InterruptedRunError, RecipeError, UpdateError
from polyrank.planning import CutPoint, Trace, moved
from polyrank.rounds import Sampling
from polyrank.run import Federation, Planning, RunSettings
from polyrank.run.planning import Importance
from polyrank.training import prepare

ALWAYS, NEVER = 0.0, 1.0
RULES = ["flora", "flora:keep", "flexlora:delta", "flexlora", "hetlora", "segment"]
EXACT = ["flora", "flora:keep", "flexlora:delta", "flexlora:tail-in-base"]
"""Rules under which clients that learn nothing change nothing, whatever their ranks were."""
FLOAT64 = 1e-12
"""A few additions of numbers near 1."""


def scores_like(made: Planning, factor: float) -> dict[str, float]:
    """Scores that are alike, but for one site's, which is so many times as large."""
    first, *others = made.planner.spec.shapes
    return {**dict.fromkeys(others, 1.0), first: factor}


def after(made: Planning, known: Importance, *rounds: dict[str, float]) -> Importance:
    for number, scores in enumerate(rounds, start=1):
        known = made.after(known, {"c0": scores}, {"c0": 1.0}, number)
    return known


# --- when plans are made anew ---


def test_importance_that_moves_past_the_threshold_is_what_the_next_plan_is_made_with() -> None:
    made = planning(threshold=0.1)
    scores = scores_like(made, 5.0)
    known = after(made, Importance(), scores)
    assert known.scores == scores
    assert known.planned == scores
    assert moved(dict.fromkeys(scores, 1.0), scores) > 0.1
    first, second = made.planned(Importance()), made.planned(known)
    assert first.plans != second.plans
    top = next(iter(scores))
    assert [second.plans[name].ranks.get(top) for name in ("laptop", "station")] == [4, 4]


def test_importance_that_moves_less_is_noted_and_changes_no_plan() -> None:
    made = planning(threshold=0.4)
    scores = scores_like(made, 5.0)
    assert 0.1 < moved(dict.fromkeys(scores, 1.0), scores) < 0.4
    known = after(made, Importance(), scores)
    assert known == Importance(scores, {})


def test_movement_is_measured_from_the_present_plan_and_not_from_the_last_round() -> None:
    made = planning(threshold=0.2, rounds=10**6)
    steps = [scores_like(made, factor) for factor in (2.0, 3.0, 4.0, 5.0, 6.0)]
    known, planned = Importance(), []
    for number, scores in enumerate(steps, start=1):
        known = made.after(known, {"c0": scores}, {"c0": 1.0}, number)
        planned.append(bool(known.planned))
    assert planned == [False, False, True, True, True]
    # From 4 to 6 the share moves by less than 0.2: the plan of the third round stays.
    assert known.planned == pytest.approx(steps[2], rel=1e-3)
    assert known.scores == pytest.approx(steps[-1], rel=1e-3)


def test_a_round_without_scores_changes_nothing() -> None:
    made = planning(threshold=ALWAYS)
    known = after(made, Importance(), scores_like(made, 5.0))
    assert made.after(known, {"c0": {}, "c1": {}}, {"c0": 0.5, "c1": 0.5}, 2) is known
    assert made.after(known, {}, {}, 2) is known


def test_scores_are_weighed_by_clients_and_smoothed_over_the_rounds_of_the_run() -> None:
    made = planning(threshold=NEVER, rounds=4)
    site = next(iter(made.planner.spec.shapes))
    weights = {"c0": 0.25, "c1": 0.75}
    known = made.after(Importance(), {"c0": {site: 4.0}, "c1": {site: 8.0}}, weights, 1)
    assert known.scores == {site: pytest.approx(7.0)}
    known = made.after(known, {"c0": {site: 7.0}, "c1": {}}, weights, 2)
    assert known.scores == {site: pytest.approx(7.0)}
    late = made.after(known, {"c0": {site: 14.0}, "c1": {}}, weights, 9)
    share = 1 - math.exp(-2.0)  # t/T is 1 at most, in rounds after the last too.
    assert late.scores == {site: pytest.approx(share * 7.0 + (1 - share) * 14.0)}


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_no_measure_are_refused_with_site_and_client(score: float) -> None:
    made = planning()
    site = next(iter(made.planner.spec.shapes))
    with pytest.raises(UpdateError, match=f"client c0.*{site}"):
        made.after(Importance(), {"c0": {site: score}}, {"c0": 1.0}, 1)


def test_a_client_whose_scores_are_not_finite_is_left_out_of_the_round() -> None:
    with opened(threshold=ALWAYS) as run:
        real = run.engine.execute

        def execute(tasks, on_step=None):
            for answer in real(tasks, on_step):
                if answer.client == "c0":
                    site = next(iter(answer.importance))
                    answer = replace(answer, importance={**answer.importance, site: math.inf})
                yield answer

        run.engine.execute = execute  # type: ignore[method-assign]
        (record,) = run.rounds(1)
        assert list(record.rejected) == ["c0"]
        assert "importance" in record.rejected["c0"]
        assert all(math.isfinite(score) for score in run._at.importance.scores.values())


# --- rounds ---


def ranks_by_round(run: Federation, rounds: int) -> list[dict[str, dict[str, int]]]:
    """The ranks of all clients before the first round, and after each."""
    found = [{client: dict(own) for client, own in run.ranks.items()}]
    for _ in run.rounds(rounds):
        found.append({client: dict(own) for client, own in run.ranks.items()})
    return found


def test_ranks_change_at_the_next_round_and_not_before() -> None:
    trained: list[dict[str, int]] = []
    with opened(threshold=ALWAYS, settings=replace(CONDUCT, cohort=1)) as run:
        real = run.engine.execute

        def execute(tasks, on_step=None):
            for answer in real(tasks, on_step):
                if answer.client == "c1":
                    trained.append({site: d.rank for site, d in answer.adapter.items()})
                yield answer

        run.engine.execute = execute  # type: ignore[method-assign]
        first, second, third = (found["c1"] for found in ranks_by_round(run, 2))
    assert trained == [first, second]
    assert first != second
    assert set(second.values()) <= {1, 2, 4}
    assert third


def test_without_a_move_past_the_threshold_all_rounds_have_the_first_ranks() -> None:
    with opened(threshold=NEVER) as run:
        first, *later = ranks_by_round(run, 3)
        assert later == [first] * 3
        assert run._at.importance.scores
        assert not run._at.importance.planned


def test_without_a_metric_nothing_is_scored_and_nothing_changes() -> None:
    with opened(threshold=ALWAYS, metric=None) as run:
        assert run.engine.scoring.every == 0
        first, *later = ranks_by_round(run, 2)
        assert later == [first] * 2
        assert run._at.importance == Importance()


def test_the_records_say_when_plans_were_made_anew_and_what_a_round_takes_by_the_model() -> None:
    with opened(threshold=ALWAYS) as run:
        assert run.planned is not None
        expected = max(
            run.planned.plans[name].seconds.round for name in run.fleet.assigned.values()
        )
        first, second = run.rounds(2)
        assert first.planned_anew
        assert first.modelled_seconds == expected
        assert second.modelled_seconds != expected, "that of the plan that was followed"
    with opened(threshold=NEVER) as run:
        assert not any(record.planned_anew for record in run.rounds(2))


@pytest.mark.parametrize("called", RULES)
def test_a_plan_made_anew_changes_ranks_and_nothing_that_was_learnt(called: str) -> None:
    """The scores of round 1 are taken before plans are made, and again after."""
    run_settings = RunSettings(evaluation=replace(federations.MEASURED, own_rank=False), cohort=2)
    with opened(called=called, threshold=ALWAYS, settings=run_settings) as run:
        before = dict(run.ranks)
        (record,) = run.rounds(1)
        assert dict(run.ranks) != before
        assigned = run.rule.adapter(run.state)
        assert sum(delta.norm() for delta in assigned.values()) > 0
        again = run._evaluation.of_round(run.state, 1, last=False)
        assert again == record.evaluation
        saved = run.folder.load_checkpoint()
        assert saved.importance == run._at.importance
        for site, delta in run.rule.adapter(saved.state).items():
            assert torch.equal(delta.dense(), assigned[site].dense())


@pytest.mark.parametrize("called", EXACT)
def test_clients_that_learn_nothing_at_their_new_ranks_leave_the_sum_as_it_is(called: str) -> None:
    model = deep(dtype=torch.float64)
    with opened(called=called, threshold=ALWAYS, model=model) as run:
        before = {client: dict(own) for client, own in run.ranks.items()}
        list(run.rounds(1))
        assert dict(run.ranks) != before
        learnt = {site: d.dense() for site, d in run.rule.adapter(run.state).items()}
        run.engine.local = replace(run.engine.local, lr=1e-30)
        list(run.rounds(2))
        for site, delta in run.rule.adapter(run.state).items():
            assert torch.allclose(delta.dense(), learnt[site], rtol=0, atol=FLOAT64)


def test_a_device_may_be_cut_elsewhere_by_a_new_plan() -> None:
    """The phone affords a head of one block, and no more; its tail's ranks follow the scores."""
    with opened(threshold=ALWAYS) as run:
        assert run.fleet.cuts == {"phone": CutPoint(1)}
        list(run.rounds(2))
        phone = run.planned.plans["phone"]  # type: ignore[union-attr]
        assert phone.cut is not None
        assert phone.memory.total <= phone.device.memory_bytes
        assert run.fleet.cuts["phone"] == phone.cut


def test_devices_follow_their_schedule() -> None:
    made = planning(threshold=NEVER)
    later = Trace({2: {"c0": "station"}, 3: {"*": "laptop"}})
    made = replace(made, fleet=made.fleet.with_schedule(later))
    with opened(planned=made) as run:
        by_type = run.fleet.ranks_by_type(run.model.spec)
        settings = run._round_settings
        found = [
            [settings.ranks_of(client, number) for client in ("c0", "c1")] for number in (1, 2, 3)
        ]
        types = [("phone", "laptop"), ("station", "laptop"), ("laptop", "laptop")]
        assert found == [[by_type[name] for name in pair] for pair in types]
        assert [settings.cut("c0", number) for number in (1, 2)] == [CutPoint(1), None]
        records = list(run.rounds(3))
        assert [record.rejected for record in records] == [{}, {}, {}]


@pytest.mark.parametrize(("force", "name"), [("weakest", "phone"), ("station", "station")])
def test_all_clients_may_have_the_plan_of_one_device(force: str, name: str) -> None:
    with opened(threshold=ALWAYS, force=force) as run:
        assert set(run.fleet.assigned.values()) == {name}
        list(run.rounds(1))
        assert set(run.fleet.assigned.values()) == {name}
        assert run.planned is not None
        own = run.planned.plans[name]
        assert all(dict(ranks) == dict(own.ranks) for ranks in run.ranks.values())


def test_one_adapter_at_the_server_gets_the_same_ranks_from_all_plans() -> None:
    split = replace(CONDUCT.split, adapters="shared", in_flight=1)
    run_settings = replace(CONDUCT, split=split)
    model = deep()
    made = planning(model, run_settings=run_settings, threshold=ALWAYS)
    phone = made.devices["phone"]
    two_blocks = made.planner.cost.memory({}, CutPoint(2)).total
    tablet = replace(phone, name="tablet", memory_bytes=two_blocks + 3000)
    made = planning(
        model,
        run_settings=run_settings,
        threshold=ALWAYS,
        given={"phone": phone, "tablet": tablet},
    )
    with opened(called="flexlora", planned=made, model=model, settings=run_settings) as run:
        list(run.rounds(2))
        ranks = run.fleet.ranks_by_type(model.spec)
        behind = [s.name for s in model.spec.sites if s.block == 2]
        assert [[one.get(s, 0) for s in behind] for one in ranks.values()].count(
            [ranks["phone"].get(s, 0) for s in behind]
        ) == 2
        assert sum(ranks["phone"].get(s, 0) for s in behind) < 4 * len(behind)


def test_a_pooled_run_is_planned_and_scores_nothing() -> None:
    run_settings = replace(CONDUCT, pooled=True)
    with opened(called="fedit", threshold=ALWAYS, settings=run_settings) as run:
        (record,) = run.rounds(1)
        assert run.engine.scoring.every == 0
        assert record.modelled_seconds is None
        assert not run._at.importance.scores


def test_a_client_whose_device_cannot_take_part_ends_it_before_anything_is_written(
    tmp_path: Path,
) -> None:
    made = planning()
    poor = {**made.devices, "phone": replace(made.devices["phone"], memory_bytes=1000)}
    with pytest.raises(RecipeError, match="phone: memory: the least that can be trained"):
        opened(tmp_path / "run", planned=replace(made, devices=poor))
    assert not (tmp_path / "run").exists()


# --- how often importance is measured, and going on ---


def test_how_often_is_measured_on_the_largest_batch_with_the_fewest_adapted_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, object]] = []

    def measured(model, metric, **how):
        asked.append({"metric": metric, **how})
        return 3

    monkeypatch.setattr("polyrank.run.replanning.scoring_interval", measured)
    with opened(every="auto", metric="paper") as run:
        assert run.engine.scoring.every == 3
        assert run.engine.scoring.metric == "paper"
        assert run.planned is not None
        blocks = {site.name: site.block for site in run.model.spec.sites}
        fewest = min(len({blocks[s] for s in plan.ranks}) for plan in run.planned.plans.values())
    (how,) = asked
    assert how["metric"] == "paper"
    assert len({blocks[site] for site in how["ranks"]}) == fewest  # type: ignore[attr-defined]
    assert (how["rows"], how["length"]) == (LOCAL.batch, run.planning.planner.cost.workload.length)  # type: ignore[union-attr]


def test_a_run_that_goes_on_scores_as_often_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how_often = "polyrank.run.replanning.scoring_interval"
    monkeypatch.setattr(how_often, lambda *_, **__: 5)
    with opened(tmp_path / "run", every="auto") as run:
        list(run.rounds(1))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["plan"]["score_every"] == 5

    def fails(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(how_often, fails)
    with opened(tmp_path / "run", every="auto", rest={"resume": True}) as run:
        assert run.engine.scoring.every == 5
        assert run.engine.scoring.metric == "channel"


def test_a_run_that_is_stopped_after_a_new_plan_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def carried_out(name: str, stop_at: int | None = None) -> int:
        """Return how often it was asked whether to stop."""
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == stop_at

        run_settings = replace(CONDUCT, sampling=Sampling(number=3), cohort=1)
        rest = {"stop": stop, "resume": (tmp_path / name).exists()}
        with opened(
            tmp_path / name, threshold=ALWAYS, settings=run_settings, called="flora:keep", rest=rest
        ) as run:
            list(run.rounds(3))
            run.finish()
        return asked

    questions = carried_out("whole")
    last = "checkpoints/round-00003"
    for tenths in (5, 7, 9):  # Of three rounds: in the second, in the third, at the end.
        with pytest.raises(InterruptedRunError):
            carried_out("other", questions * tenths // 10)
        carried_out("other")
        for file in ("adapter/adapter_model.safetensors", f"{last}/state.safetensors"):
            whole, other = ((tmp_path / one / file).read_bytes() for one in ("whole", "other"))
            assert whole == other, tenths
        shutil.rmtree(tmp_path / "other")
    assert json.loads((tmp_path / "whole" / last / "importance.json").read_text())["planned"]


def test_other_devices_are_another_run(tmp_path: Path) -> None:
    from polyrank.errors import InexactResumeError

    with opened(tmp_path / "run", threshold=NEVER) as run:
        list(run.rounds(1))
    made = planning(threshold=NEVER)
    richer = {n: replace(d, memory_bytes=d.memory_bytes + 1) for n, d in made.devices.items()}
    with pytest.raises(InexactResumeError, match=r"plan\.devices\.laptop\.memory"):
        opened(tmp_path / "run", planned=replace(made, devices=richer), rest={"resume": True})


def test_rules_are_told_of_every_rank_that_may_come() -> None:
    made = planning(threshold=ALWAYS)
    with opened(planned=made, called="hetlora") as run:
        list(run.rounds(2))
        state = run.rule.adapter(run.state)
        assert isinstance(state, Adapter)
        assert {site: delta.rank for site, delta in state.items()} == dict.fromkeys(
            run.model.spec.shapes, 4
        )


def test_new_plans_may_follow_the_spectra_of_what_was_learnt(tmp_path: Path) -> None:
    given = {"threshold": ALWAYS, "allocation": "spectrum", "called": "flexlora:delta"}
    with opened(tmp_path / "run", **given) as run:
        first = {name: plan.ranks for name, plan in run.planned.plans.items()}  # type: ignore[union-attr]
        list(run.rounds(1))
        known, planned = run._at.importance, run.planned
        assert planned is not None
        for site, delta in run.rule.adapter(run.state).items():
            values = torch.linalg.svdvals(delta.dense())[:4]
            assert known.spectra[site] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        station = planned.plans["station"]
        assert station.ranks != first["station"]
        assert station.memory.total <= station.device.memory_bytes
        assert max(station.ranks.values()) <= 4

        def kept(ranks: Mapping[str, int]) -> float:
            values = known.spectra.items()
            return sum(v * v for site, own in values for v in own[: ranks.get(site, 0)])

        even_again = run.planning.plans(Importance())["station"]  # type: ignore[union-attr]
        assert kept(station.ranks) > kept(even_again.ranks)
    with opened(tmp_path / "run", **given, rest={"resume": True}) as run:
        assert run.planned == planned, "what is kept is enough to plan the same again"
        list(run.rounds(2))


def test_a_step_is_of_the_longest_rows_and_a_round_of_the_client_with_most_steps() -> None:
    data = federations.clients()
    one = data["c1"]
    long = Example("w4 w5 w6 w7 w8 w9", ("w4 w5 w6",), 0)
    data["c1"] = replace(one, train=(long, *one.train))
    local = replace(LOCAL, epochs=1, steps=None)
    model = deep()
    work, _ = prepare(data, model, CONDUCT.encoding)
    made = planning(model, data, local=local).planner
    every = [size for client in work.values() for size in sizes(client.rows["train"])]
    load = made.cost.workload
    assert load.length == max(size.tokens for size in every) > min(size.tokens for size in every)
    assert load.targets == max(size.targets for size in every)
    device = plannings.SERVER
    times = made.cost.seconds({}, None, device, device, 1)
    steps = max(local.steps_for(len(client.train)) for client in data.values())
    plan = made.plans({"d": device})["d"]
    assert steps > min(local.steps_for(len(client.train)) for client in data.values())
    assert plan.seconds == made.cost.seconds(plan.ranks, plan.cut, device, made.server, steps)
    assert times.round < plan.seconds.round


@pytest.mark.parametrize("metric", ["channel", None])
def test_memory_for_a_scored_step_is_looked_for_where_there_will_be_one(
    metric: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def measured(*_: object, scored: bool) -> int:
        asked.append(scored)
        return 1

    monkeypatch.setattr("polyrank.run.preflight.slot_bytes", measured)
    with opened(metric=metric):
        assert asked == [metric is not None]


def test_a_rule_of_one_rank_takes_plans_that_never_change() -> None:
    with opened(called="fedit", metric=None, force="weakest") as run:
        assert [record.rejected for record in run.rounds(2)] == [{}, {}]
