"""A federation: repeatable, resumable, tolerant of bad clients, and refusing what cannot work."""

import gc
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import federations
from federations import LOCAL, MEASURED, QUIET, TYPES, clients, fleet, opened
from polyrank.aggregation import FedIT, FlexLoRA, FLoRA
from polyrank.algebra import Adapter
from polyrank.errors import (
    CheckpointError,
    DataError,
    FolderExistsError,
    InexactResumeError,
    InterruptedRunError,
    PolyrankError,
    RankError,
    RecipeError,
    ResourceError,
    RoundFailedError,
    RuleError,
    RunError,
)
from polyrank.planning import Fleet, LoRAType
from polyrank.rounds import Faults, Sampling, Weighting
from polyrank.run import EarlyStopping, Federation, RunSettings, engine
from polyrank.training import Encoding

PLAIN = RunSettings(evaluation=QUIET, cohort=2)


@pytest.fixture(scope="module")
def model():
    return federations.one_block()


def play(parts, until: int = 2):
    """Run to the end and return (records, summary)."""
    with parts:
        records = list(parts.rounds(until))
        return records, parts.finish()


def timeless(value):
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


# --- the same again ---


def test_the_same_run_twice_gives_the_same_bytes(tmp_path, model):
    both = []
    for name in ("one", "two"):
        records, summary = play(opened(tmp_path / name, model=model))
        state = tmp_path / name / "checkpoints" / "round-00002" / "state.safetensors"
        both.append(
            (
                weights(tmp_path / name),
                state.read_bytes(),
                timeless([record.to_json() for record in records]),
                timeless(summary),
            )
        )
    assert both[0] == both[1]


def test_another_seed_gives_another_adapter(tmp_path, model):
    for seed in (0, 1):
        play(opened(tmp_path / str(seed), model=model, settings=replace(PLAIN, seed=seed)))
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_the_order_of_the_clients_changes_no_byte(tmp_path, model):
    data = clients()
    turned = dict(reversed(data.items()))
    for name, given in (("as is", data), ("turned", turned)):
        play(opened(tmp_path / name, model=model, data=given, settings=PLAIN))
    assert weights(tmp_path / "as is") == weights(tmp_path / "turned")


def test_the_model_is_as_it_was_afterwards(model):
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    play(opened(model=model), until=1)
    assert all(torch.equal(before[name], p) for name, p in model.module.named_parameters())
    assert not any(child._forward_hooks for child in model.module.modules())


# --- going on ---


def test_a_run_goes_on_after_every_round_as_if_it_had_not_stopped(tmp_path, model):
    run_settings = RunSettings(
        evaluation=MEASURED, cohort=2, stopping=EarlyStopping(3), sampling=Sampling(number=3)
    )
    play(opened(tmp_path / "whole", model=model, settings=run_settings), until=3)
    for until in (1, 2, 3):
        with opened(
            tmp_path / "parts", model=model, settings=run_settings, resume=until > 1
        ) as parts:
            assert parts.round == until - 1
            assert [record.round for record in parts.rounds(until)] == [until]
    with opened(tmp_path / "parts", model=model, settings=run_settings, resume=True) as parts:
        assert list(parts.rounds(3)) == [], "after the last checkpoint, before finish"
        parts.finish()
    for name in ("base.json", "evaluation.json", "checkpoints/round-00003/manifest.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_updates_stay_no_longer_than_their_round(tmp_path, model):
    with opened(tmp_path / "run", model=model, settings=PLAIN) as parts:
        for _ in parts.rounds(2):
            assert list((tmp_path / "run" / "updates").iterdir()) == []


def test_a_finished_run_can_be_made_longer(tmp_path, model):
    play(opened(tmp_path / "long", model=model), until=3)
    _, short = play(opened(tmp_path / "run", model=model), until=1)
    assert short["rounds"] == 1
    with opened(tmp_path / "run", model=model, resume=True) as parts:
        rest = parts.rounds(3)
        next(rest)
        assert not (tmp_path / "run" / "summary.json").exists(), "it told of a shorter run"
        list(rest)
        assert parts.finish()["rounds"] == 3
    assert weights(tmp_path / "run") == weights(tmp_path / "long")


def test_the_last_round_is_evaluated_and_a_longer_run_ends_with_the_same_bytes(tmp_path, model):
    """Early stopping counts the evaluations that both have: here the second round's alone."""
    measured = replace(MEASURED, every=2)
    run_settings = RunSettings(evaluation=measured, cohort=2, stopping=EarlyStopping(1))
    records, _ = play(opened(tmp_path / "long", model=model, settings=run_settings), until=4)
    assert [record.evaluation is not None for record in records] == [False, True, False, True]
    records, _ = play(opened(tmp_path / "run", model=model, settings=run_settings), until=3)
    assert [record.evaluation is not None for record in records] == [False, True, True]
    with opened(tmp_path / "run", model=model, settings=run_settings, resume=True) as parts:
        list(parts.rounds(4))
        parts.finish()
    assert weights(tmp_path / "run") == weights(tmp_path / "long")


def test_a_run_without_evaluations_has_none_after_the_last_round_either(model):
    with opened(model=model, settings=PLAIN) as parts:
        assert [record.evaluation for record in parts.rounds(2)] == [None, None]


def test_a_run_keeps_some_texts_before_and_after_and_each_clients_own_losses(tmp_path, model):
    records, summary = play(opened(tmp_path / "run", model=model), until=2)
    assert [sample["client"] for sample in summary["samples"]] == ["c0", "c1", "u0", "c2", "c3"]
    told = json.loads((tmp_path / "run" / "base.json").read_text())["samples"]
    assert [one["before"] for one in summary["samples"]] == [one["text"] for one in told]
    first, second = records
    assert set(first.losses) == {"c0", "c1", "c2", "c3"}
    assert first.loss_change is None
    changes = [second.losses[id] - first.losses[id] for id in second.losses]
    assert second.loss_change == pytest.approx(statistics.fmean(changes))


def test_a_wish_to_stop_keeps_the_clients_that_are_done(tmp_path, model):
    play(opened(tmp_path / "whole", model=model, settings=PLAIN), until=1)
    steps = []

    def stop() -> bool:
        if (tmp_path / "run" / "base.json").exists():  # The base is evaluated: only steps count.
            steps.append(1)
        return len(steps) == 8  # In the second cohort of the first round.

    with opened(tmp_path / "run", model=model, settings=PLAIN, stop=stop) as parts:
        with pytest.raises(InterruptedRunError, match="stopped in round 1"):
            list(parts.rounds(1))
    assert len(list((tmp_path / "run" / "updates").iterdir())) == 2
    trained = []
    with opened(tmp_path / "run", model=model, settings=PLAIN, resume=True) as parts:
        real = parts.engine.execute
        parts.engine.execute = lambda tasks, step: trained.extend(tasks) or real(tasks, step)
        list(parts.rounds(1))
        parts.finish()
    assert len(trained) == 2
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_wish_to_stop_is_heard_within_an_evaluation(tmp_path, model):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    with opened(tmp_path / "run", model=model, stop=stop) as parts:
        with pytest.raises(InterruptedRunError):
            parts.base()
    assert not (tmp_path / "run" / "base.json").exists()
    play(opened(tmp_path / "whole", model=model), until=1)
    with opened(tmp_path / "run", model=model, resume=True) as parts:
        list(parts.rounds(1))
        parts.finish()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_one_round_and_no_byte(tmp_path, model):
    play(opened(tmp_path / "whole", model=model), until=3)
    play(opened(tmp_path / "run", model=model), until=3)
    (tmp_path / "run" / "checkpoints" / "round-00003" / "state.safetensors").write_bytes(b"?")
    with opened(tmp_path / "run", model=model, resume=True) as parts:
        assert "round-00003 is damaged" in parts.folder.notes[0]
        (third,) = parts.rounds(3)
        parts.finish()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    lines = [(tmp_path / name / "rounds.jsonl").read_text() for name in ("run", "whole")]
    again, before = (json.loads(text.splitlines()[-1]) for text in lines)
    assert third.loss_change is not None
    assert timeless(again) == timeless(before)
    for number in (2, 3):
        path = tmp_path / "run" / "checkpoints" / f"round-0000{number}" / "manifest.json"
        path.write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint can be read whole"):
        opened(tmp_path / "run", model=model, resume=True)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 3, "what is left is not thrown away"


def test_a_round_whose_checkpoint_failed_is_recorded_once_when_it_is_tried_again(tmp_path, model):
    with opened(tmp_path / "run", model=model, settings=PLAIN) as parts:
        real = parts.folder.save_checkpoint

        def full(saved):
            parts.folder.save_checkpoint = real
            raise ResourceError("no room")

        parts.folder.save_checkpoint = full
        with pytest.raises(ResourceError, match="no room"):
            list(parts.rounds(2))
        assert [record.round for record in parts.rounds(2)] == [1, 2]
        assert [record["round"] for record in parts.folder.records()] == [1, 2]
    opened(tmp_path / "run", model=model, settings=PLAIN, resume=True).close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"local": replace(LOCAL, lr=0.5)}, "settings.local.lr: was 0.02, is 0.5"),
        ({"settings": replace(PLAIN, seed=1)}, "settings.conduct.seed: was 0, is 1"),
        ({"settings": replace(PLAIN, cohort=3)}, "settings.cohort: was 2, is 3"),
        ({"rule": FlexLoRA("delta", split="balanced")}, "settings.options.split: was 'left'"),
        ({"model": federations.one_block(seed=1)}, "model.fingerprint"),
        ({"data": clients(examples=4)}, "data: was"),
        (
            {"fleet": fleet(clients()).forced("small", federations.one_block().spec)},
            "settings.fleet",
        ),
    ],
)
def test_a_resume_that_could_not_give_the_same_bytes_is_refused(tmp_path, model, changes, named):
    play(opened(tmp_path / "run", model=model, settings=PLAIN), until=1)
    given = {"model": model, "settings": PLAIN, **changes}
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(InexactResumeError) as caught:
        opened(tmp_path / "run", resume=True, **given)
    assert named in str(caught.value)
    assert str(caught.value).count(": was ") == 1, "that difference and no other"
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_other_threads_are_refused_unless_allowed_and_then_noted(tmp_path, model):
    play(opened(tmp_path / "run", model=model, settings=PLAIN), until=1)
    threads = torch.get_num_threads()
    given = {"model": model, "settings": PLAIN, "resume": True}
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(InexactResumeError, match=f"threads: was {threads}, is {threads + 1}"):
            opened(tmp_path / "run", **given)
        with opened(tmp_path / "run", **given, allow_inexact=True) as parts:
            list(parts.rounds(2))
        with opened(tmp_path / "run", **given):
            pass  # These are the run's surroundings now.
        told = json.loads((tmp_path / "run" / "run.json").read_text())["inexact"]
        assert told == [
            {"after_round": 1, "differences": [f"threads: was {threads}, is {threads + 1}"]}
        ]
    finally:
        torch.set_num_threads(threads)


def test_the_cohort_that_memory_allowed_is_kept_on_resume(tmp_path, model):
    play(opened(tmp_path / "run", model=model, settings=PLAIN), until=1)
    given = replace(PLAIN, cohort="auto")
    with opened(tmp_path / "run", model=model, settings=given, resume=True) as parts:
        assert parts.engine.cohort == 2


def test_a_model_may_lie_elsewhere_on_resume(tmp_path, model):
    play(opened(tmp_path / "run", model=model, settings=PLAIN), until=1)
    moved = replace(model, source="/another/place")
    opened(tmp_path / "run", model=moved, settings=PLAIN, resume=True).close()


# --- folders ---


def test_an_existing_folder_is_never_overwritten(tmp_path, model):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(FolderExistsError):
        opened(tmp_path / "run", model=model)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_without_a_folder_nothing_is_left(tmp_path, model, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(model=model, settings=PLAIN) as parts:
        list(parts.rounds(1))
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []
    assert parts.adapter.factors.norm() > 0, "the result outlives its folder"


def test_the_short_way_trains_in_a_temporary_folder(tmp_path, model, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = clients()
    with opened(model=model, settings=PLAIN) as run:
        expected = [record.loss for record in run.rounds(2)], run.adapter.factors.hash()
    short = Federation(model, data, fleet(data), local=LOCAL, settings=PLAIN)
    assert list(tmp_path.iterdir()) == [], "making it computes nothing"
    assert [record.loss for record in short.rounds(1)] == expected[0][:1]
    assert [record.loss for record in short.rounds(2)] == expected[0][1:]
    assert short.adapter.factors.hash() == expected[1]
    del short
    gc.collect()
    assert list(tmp_path.iterdir()) == []


UNFIT = {
    "fedit with mixed ranks": ({"rule": FedIT()}, RuleError, "needs one rank per site"),
    "a rank above the matrix": (
        {
            "fleet": Fleet.table(
                dict.fromkeys(["c0", "c1", "c2", "c3"], "T"),
                types={"T": LoRAType("T", {"all": 99})},
            )
        },
        RankError,
        "rank 99",
    ),
    "a client without type": (
        {"fleet": Fleet.table({"c0": "small"}, types=TYPES)},
        RankError,
        r"no LoRA type for the clients \['c1', 'c2', 'c3'\]",
    ),
    "a client that is not there": (
        {"fleet": Fleet.table(fleet(clients()).assigned | {"c33": "small"}, types=TYPES)},
        RankError,
        r"no clients \['c33'\]; did you mean 'c3'",
    ),
    "a sequence beyond the context": (
        {"settings": replace(PLAIN, encoding=Encoding(max_length=65))},
        DataError,
        "context",
    ),
    "nothing fits": (
        {"settings": replace(PLAIN, encoding=Encoding(max_length=3))},
        DataError,
        "no client has a usable training example",
    ),
    "patience without evaluation": (
        {"settings": replace(PLAIN, stopping=EarlyStopping(2))},
        RecipeError,
        "evaluation.every",
    ),
    "patience without validation data": (
        {
            "settings": RunSettings(evaluation=MEASURED, stopping=EarlyStopping(2)),
            "data": {id: replace(c, validation=()) for id, c in clients().items()},
        },
        DataError,
        "validation example",
    ),
    "no room for an answer": (
        {"settings": replace(PLAIN, evaluation=replace(MEASURED, max_new_tokens=64))},
        RecipeError,
        "leave no room",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_work_is_refused_before_there_is_a_folder(
    tmp_path, model, given, error, message
):
    with pytest.raises(error, match=message):
        opened(tmp_path / "new" / "run", model=model, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_memory_or_disk_is_seen_before_there_is_a_folder(
    tmp_path, model, monkeypatch, what
):
    names = {"memory": "free_memory", "disk": "shutil.disk_usage"}
    few = {"memory": lambda _: 10, "disk": lambda _: type("Usage", (), {"free": 10})}
    monkeypatch.setattr(f"polyrank.run.preflight.{names[what]}", few[what])
    with pytest.raises(PolyrankError, match="MiB"):
        opened(tmp_path / "new" / "run", model=model, settings=PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_at_the_first_write_leaves_no_folder(tmp_path, model):
    with pytest.raises(RunError, match="cannot be made"):
        opened(tmp_path / "run", model=model, files={"no/such/folder.toml": "x"})
    assert list(tmp_path.iterdir()) == []


def test_only_a_run_can_be_resumed(tmp_path, model):
    with pytest.raises(RunError, match="expected a run folder"):
        opened(tmp_path, model=model, resume=True)
    assert list(tmp_path.iterdir()) == []


# --- bad clients ---


def spoil(parts, who, change) -> None:
    """Let the answers of some clients be changed on their way."""
    real = parts.engine.execute

    def execute(tasks, on_step=None):
        for answer in real(tasks, on_step):
            yield change(answer) if who(answer) else answer

    parts.engine.execute = execute


def nan(update):
    return replace(
        update, adapter=Adapter({s: d.scale(float("nan")) for s, d in update.adapter.items()})
    )


def test_a_bad_update_is_counted_and_the_round_is_that_of_the_others(model):
    others = {id: client for id, client in clients().items() if id != "c1"}
    alone = opened(model=model, data=others, settings=replace(PLAIN, cohort=1))
    spoiled = opened(
        model=model,
        settings=replace(PLAIN, cohort=1),
        data=clients(),
        fleet=Fleet.table(alone.fleet.assigned | {"c1": "large"}, types=TYPES),
    )
    spoil(spoiled, lambda a: a.client == "c1", nan)
    with alone, spoiled:
        (expected,), (got,) = list(alone.rounds(1)), list(spoiled.rounds(1))
        assert "NaN or infinite" in got.rejected["c1"]
        assert got.bytes_up > expected.bytes_up, "it travelled all the same"
        assert spoiled.adapter.factors.hash() == alone.adapter.factors.hash()


def test_updates_that_are_shortened_are_told_of_and_a_killed_round_tells_the_same(tmp_path, model):
    run_settings = replace(
        PLAIN, faults=Faults(clip_increment=0.05), weights=Weighting(max_share=0.3)
    )
    records, summary = play(opened(tmp_path / "whole", model=model, settings=run_settings))
    assert all(0 < c < 1 for record in records for c in record.clipped.values())
    assert sum(len(record.clipped) for record in records) > 0
    for way in ("up", "down"):
        told = [sum(one[way] for one in record.traffic.values()) for record in records]
        assert told == [getattr(record, f"bytes_{way}") for record in records]
        assert sum(c[f"bytes_{way}"] for c in summary["clients"].values()) == sum(told)
    assert {c["rounds_joined"] for c in summary["clients"].values()} == {2}
    with opened(tmp_path / "parts", model=model, settings=run_settings) as parts:
        spoil(parts, lambda a: a.round == 2 and a.client == "c3", interrupt)
        with pytest.raises(InterruptedRunError):
            list(parts.rounds(2))
        assert any((tmp_path / "parts" / "updates").rglob("*.safetensors"))
    play(opened(tmp_path / "parts", model=model, settings=run_settings, resume=True))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    told = [
        [timeless(json.loads(line)) for line in (path / "rounds.jsonl").read_text().splitlines()]
        for path in (tmp_path / "parts", tmp_path / "whole")
    ]
    assert told[0] == told[1]


def interrupt(_):
    raise InterruptedRunError("here")


def test_a_client_that_diverges_does_not_stop_its_cohort(model, monkeypatch):
    with opened(model=model, settings=replace(PLAIN, cohort=4)) as parts:
        whole = engine.Job

        def job(client, assignment, *rest):
            if client == "c2":
                broken = {s: d.scale(float("nan")) for s, d in assignment.start.items()}
                assignment = replace(assignment, start=Adapter(broken))
            return whole(client, assignment, *rest)

        monkeypatch.setattr(engine, "Job", job)
        (record,) = parts.rounds(1)
        assert list(record.rejected) == ["c2"]
        assert "client c2, step" in record.rejected["c2"]
        assert parts.adapter.factors.norm() > 0


def test_below_the_quorum_others_are_asked_and_the_failed_attempt_is_told_of(model):
    for seed in range(4):  # Drawn without regard to who failed, the two would meet again.
        faults = Faults(quorum=1.0, attempts=2)
        run_settings = replace(PLAIN, sampling=Sampling(number=2), faults=faults, seed=seed)
        with opened(model=model, settings=run_settings) as parts:
            spoil(parts, lambda a: a.attempt == 0, nan)
            (record,) = parts.rounds(1)
        assert record.attempt == 1
        (failed,) = record.abandoned
        assert len(failed) == 2
        assert not set(failed) & set(record.clients)
        assert record.rejected == {}


def test_a_round_that_fails_in_every_attempt_changes_nothing(tmp_path, model):
    run_settings = replace(PLAIN, faults=Faults(quorum=0.6, attempts=3))
    with opened(tmp_path / "run", model=model, settings=run_settings) as parts:
        list(parts.rounds(1))
        before = parts.adapter.factors.hash()
        spoil(parts, lambda a: a.client in ("c0", "c1"), nan)
        with pytest.raises(RoundFailedError, match=r"fewer than 60% .* 3 attempts[^$]*c0: .*NaN"):
            list(parts.rounds(2))
        assert (parts.round, parts.adapter.factors.hash()) == (1, before)
        del parts.engine.execute
        assert [record.round for record in parts.rounds(2)] == [2], "and it can be tried again"


def test_the_server_may_keep_a_lower_rank_than_a_client_has(model):
    run_settings = replace(PLAIN, server_rank=2)
    with opened(model=model, settings=run_settings, rule=FlexLoRA("delta")) as parts:
        records = list(parts.rounds(2))
        assert set(parts.adapter.factors.ranks.values()) == {2}
    assert all(record.discarded > 0 for record in records)
    with pytest.raises(RecipeError, match="server_rank"):
        replace(PLAIN, server_rank=0)


def test_a_type_may_leave_sites_alone(model):
    types = {
        "attention": LoRAType("attention", {"attention": 2}),
        "everything": LoRAType("everything", {"all": 3}),
    }
    names = ["attention", "everything", "attention", "everything"]
    fleet = Fleet.table(dict(zip(["c0", "c1", "c2", "c3"], names, strict=True)), types=types)
    with opened(model=model, fleet=fleet) as parts:
        (record,) = parts.rounds(1)
        assert set(record.evaluation["own_rank"]) == {"all", "attention", "everything"}
        assert len(parts.adapter.factors) == 3
        assert set(parts.ranks["c0"]) < set(parts.ranks["c1"])
        parts.finish()
    for rule in (FlexLoRA("tail-in-base"), FLoRA()):
        with opened(model=model, fleet=fleet, rule=rule) as parts:
            list(parts.rounds(3))
            parts.finish()
    only = Fleet.table(dict.fromkeys(fleet.assigned, "attention"), types=types)
    with opened(model=model, fleet=only) as parts:
        list(parts.rounds(1))
        parts.finish()
        assert all("down_proj" not in site for site in parts.adapter.factors)


# --- who takes part ---


def test_unseen_clients_are_never_trained_on(model):
    with opened(model=model, data=clients(unseen=2)) as parts:
        asked = []
        real = parts.engine.execute
        parts.engine.execute = lambda tasks, step: asked.extend(tasks) or real(tasks, step)
        list(parts.rounds(2))
        assert {task.client for task in asked} == {"c0", "c1", "c2", "c3"}
        assert all(parts.work[id].rows["train"] == [] for id in ("u0", "u1"))
        assert len(parts.work["u0"].rows["test"]) == 7


def test_sampling_few_of_many_makes_one_assignment_per_kind_of_client(model, monkeypatch):
    data = clients(seen=40, unseen=0, examples=1)
    assigned = []
    real = FlexLoRA.assign_site
    monkeypatch.setattr(
        FlexLoRA, "assign_site", lambda self, *rest: assigned.append(1) or real(self, *rest)
    )
    evaluation = replace(MEASURED, generate=0)
    run_settings = RunSettings(sampling=Sampling(fraction=0.1), evaluation=evaluation, cohort=4)
    with opened(model=model, data=data, settings=run_settings) as parts:
        (record,) = parts.rounds(1)
    assert len(record.clients) == 4
    # three kinds of clients, three sites: to reckon memory, for training, and for scoring
    assert len(assigned) <= 3 * 3 * 3


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Weighting(), {"c0": 5.0, "c1": 6.0, "c2": 7.0, "c3": 5.0}),
        (Weighting("equal"), dict.fromkeys(["c0", "c1", "c2", "c3"], 1.0)),
        (Weighting("capped", 6), {"c0": 5.0, "c1": 6.0, "c2": 6.0, "c3": 5.0}),
    ],
)
def test_updates_weigh_by_examples_equally_or_capped(model, weighting, expected):
    with opened(model=model, settings=replace(PLAIN, weights=weighting)) as parts:
        assert dict(parts._round_settings.weights) == expected


@pytest.mark.parametrize(("by", "cap"), [("capped", None), ("capped", 0), ("equal", 3)])
def test_a_cap_belongs_to_capped(by, cap):
    with pytest.raises(RecipeError, match="cap"):
        Weighting(by, cap)


# --- early stopping ---


def scripted(parts, losses) -> None:
    """Let the validation losses after the rounds be these."""
    real = parts._evaluation.of_round

    def of_round(state, number, *, last):
        scores = real(state, number, last=last)
        scores["server"]["seen"]["loss"] = losses[number - 1]
        return scores

    parts._evaluation.of_round = of_round


@pytest.mark.parametrize("killed_after", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("restore", [True, False])
def test_early_stopping_ends_the_run_and_the_best_is_the_result(
    tmp_path, model, restore, killed_after
):
    losses = [3.0, 2.0, 2.5, None, 1.0]  # None: not finite, which is no progress either
    stopping = EarlyStopping(2, restore_best=restore)
    evaluation = replace(MEASURED, generate=0, own_rank=False)
    run_settings = RunSettings(evaluation=evaluation, cohort=4, stopping=stopping)
    given = {"model": model, "settings": run_settings}
    hashes = {}
    with opened(tmp_path / "run", **given) as parts:
        scripted(parts, losses)
        for record in parts.rounds(killed_after or 5):
            hashes[record.round] = parts.rule.adapter(parts.state).hash()
    with opened(tmp_path / "run", **given, resume=True) as parts:
        scripted(parts, losses)
        for record in parts.rounds(5):
            hashes[record.round] = parts.rule.adapter(parts.state).hash()
        summary = parts.finish()
        assert parts.adapter.factors.hash() == hashes[2 if restore else 4]
    assert sorted(hashes) == [1, 2, 3, 4]
    assert summary["rounds"] == 4
    assert summary["result_round"] == (2 if restore else 4)
    assert summary["stopped"] == "no lower validation loss in 2 evaluations since round 2"


def test_a_gain_below_min_delta_is_none(model):
    evaluation = replace(MEASURED, generate=0, own_rank=False)
    stopping = EarlyStopping(2, min_delta=0.5)
    run_settings = RunSettings(evaluation=evaluation, cohort=4, stopping=stopping)
    with opened(model=model, settings=run_settings) as parts:
        scripted(parts, [3.0, 2.6, 2.51])
        assert [record.round for record in parts.rounds(9)] == [1, 2, 3]


def test_the_summary_tells_when_the_target_was_reached(tmp_path, model):
    evaluation = replace(MEASURED, generate=0, own_rank=False)
    for target, expected in ((2.0, 2), (0.5, None)):
        run_settings = RunSettings(evaluation=evaluation, cohort=4, target_loss=target)
        with opened(model=model, settings=run_settings) as parts:
            scripted(parts, [3.0, 2.0, 1.0])
            records = list(parts.rounds(3))
            told = parts.finish()["to_target"]
        assert (told["loss"], told["rounds"]) == (target, expected)
        sent = sum(r.bytes_up + r.bytes_down for r in records[: expected or 0]) or None
        assert told["bytes"] == sent
        assert (told["seconds"] is None) == (expected is None)
