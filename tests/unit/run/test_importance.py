"""Scores ride on updates: given by the engine, judged, kept on disk, there again on resume."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import federations
from federations import LOCAL, QUIET, clients, fleet, one_block
from polyrank.aggregation import FlexLoRA, Update
from polyrank.errors import RecipeError, UpdateError
from polyrank.planning import Fleet, LoRAType
from polyrank.rounds.round import Round
from polyrank.run import RunSettings, setup, storage
from polyrank.run.engine import InProcessEngine
from polyrank.training import Scoring, prepare
from polyrank.training.encoding import Encoding

DATA = clients()


def with_engine(who: Fleet | None = None, **scoring: object) -> tuple[InProcessEngine, Round]:
    model = one_block()
    work, _ = prepare(DATA, model, Encoding())
    made = setup.round_settings(FlexLoRA(), who or fleet(DATA), model.spec, work, RunSettings())
    spec = setup.fleet_spec(made, who or fleet(DATA), model.spec, None)
    round = Round(made, made.rule.init(spec), 1, 0, sorted(made.ranks))
    return InProcessEngine(model, work, LOCAL, 2, **scoring), round


def answers(engine: InProcessEngine, round: Round) -> dict[str, Update]:
    groups = engine.cohorts(round.clients)
    found = [one for group in groups for one in engine.execute([round.task(c) for c in group])]
    return {one.client: one for one in found}


def test_an_engine_scores_all_sites_of_the_model_also_those_that_a_client_leaves_alone() -> None:
    one = {"few": LoRAType("few", {"attention": 2})}
    who = Fleet.table(dict.fromkeys(fleet(DATA).assigned, "few"), types=one)
    engine, round = with_engine(who, score_every=2, metric="paper")
    for client, update in answers(engine, round).items():
        assert update.importance.keys() == engine.model.spec.shapes.keys()
        assert len(update.adapter) < len(update.importance)
        assert min(update.importance.values()) > 0.0
        round.accept(update)
        assert round.accepted[client].importance == update.importance


def test_an_engine_that_is_not_asked_scores_nothing() -> None:
    engine, round = with_engine()
    assert all(update.importance == {} for update in answers(engine, round).values())
    with pytest.raises(RecipeError, match="a metric of"):
        with_engine(metric="sum")


def scored(value: float, site: str = "model.layers.0.mlp.down_proj") -> Callable[[Update], Update]:
    return lambda update: replace(update, importance={**update.importance, site: value})


BAD = {
    "NaN": (scored(float("nan")), r"importance of 0 or more at .*down_proj, got nan"),
    "infinite": (scored(float("inf")), r"finite importance .* at .*down_proj, got inf"),
    "negative": (scored(-1e-9), r"of 0 or more at .*down_proj, got -1e-09"),
    "an unknown site": (scored(1.0, "lm_head"), r"\['lm_head'\], which are no sites"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_scores_are_refused_with_client_and_site(
    spoil: Callable[[Update], Update], message: str
) -> None:
    engine, round = with_engine(score_every=1)
    update = answers(engine, round)["c1"]
    with pytest.raises(UpdateError, match=message) as caught:
        round.accept(spoil(update))
    assert "client 'c1' in round 1" in str(caught.value)
    round.accept(update)


def test_without_a_list_of_sites_those_of_the_assignment_may_be_scored() -> None:
    engine, round = with_engine(score_every=1)
    round.settings = replace(round.settings, sites=None)
    round.accept(answers(engine, round)["c1"])
    with pytest.raises(UpdateError, match="no sites of the model"):
        round.accept(scored(1.0, "elsewhere")(answers(engine, round)["c2"]))


def test_scores_come_back_from_the_disk_bit_by_bit(tmp_path: Path) -> None:
    engine, round = with_engine(score_every=1)
    for client, update in answers(engine, round).items():
        storage.write_update(tmp_path / client, update)
        assert dict(storage.read_update(tmp_path / client).importance) == dict(update.importance)
    plain = replace(update, importance={})
    storage.write_update(tmp_path / "plain", plain)
    assert storage.read_update(tmp_path / "plain").importance == {}
    assert b"importance" not in (tmp_path / "plain").read_bytes()


def test_a_resumed_round_has_the_scores_of_the_updates_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_settings = RunSettings(evaluation=QUIET, cohort=1)
    seen: list[dict[str, dict[str, float]]] = []
    aggregate = Round.aggregate

    def note(self: Round, read: Callable) -> object:
        seen.append({c: dict(receipt.importance) for c, receipt in self.accepted.items()})
        return aggregate(self, read)

    monkeypatch.setattr(Round, "aggregate", note)

    def carried_out(folder: Path, fails_at: int | None) -> None:
        with federations.opened(folder, settings=run_settings, resume=folder.exists()) as run:
            run.engine.scoring = Scoring(1)
            trained, execute = [], run.engine.execute

            def executed(tasks: object, on_step: object = None) -> object:
                if len(trained) == fails_at:
                    raise KeyboardInterrupt
                trained.append(tasks)
                return execute(tasks, on_step)

            run.engine.execute = executed  # type: ignore[method-assign]
            list(run.rounds(1))

    carried_out(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        carried_out(tmp_path / "cut", 2)
    carried_out(tmp_path / "cut", None)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert all(seen[0].values())
