"""Held-out sources: what is measured on them, beside a direct computation."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from federations import MEASURED, QUIET, one_block, opened
from models import random_adapter
from polyrank.data import tasks_from_rows
from polyrank.errors import DataError, RecipeError
from polyrank.evaluation import Benchmark, BenchmarkSettings
from polyrank.evaluation.benchmark import NO_ROOM, perplexity
from polyrank.evaluation.metrics import corpus_scores
from polyrank.run import RunSettings
from polyrank.training.encoding import Encoding

PLAIN = Encoding(template="{prompt}", loss_on="all")
SETTINGS = BenchmarkSettings(max_new_tokens=3, batch=3)


def validation(rows: int = 7):
    return tasks_from_rows(
        {"input": f"w{4 + i} w{5 + 2 * i}", "output": " ".join(["w9", f"w{20 + i}"] * (1 + i % 3))}
        for i in range(rows)
    )


def held_out():
    """Four inputs, the first and the third of which came twice and three times."""
    asked = ["w4", "w5", "w4", "w6", "w6", "w7", "w6"]
    return tasks_from_rows(
        {"input": input, "output": f"w{40 + i} w{41 + i}"} for i, input in enumerate(asked)
    )


@pytest.fixture(scope="module")
def model():
    return one_block(torch.float64)


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model, 3).scale(0.3)


def test_perplexity_weighs_every_token_of_the_completions_alike(model) -> None:
    made = Benchmark.of(model, SETTINGS, PLAIN, validation=validation())
    losses = []
    for row in made.validation:
        ids = torch.tensor(row.input_ids)
        with torch.no_grad():
            logits = model.module(input_ids=ids[None]).logits[0]
        # The prompt of two words (and the first token) is not counted, whatever clients learn.
        assert row.loss_from == row.prompt_length == len(ids) - row.targets
        losses.append(
            cross_entropy(logits[row.loss_from - 1 : -1], ids[row.loss_from :], reduction="none")
        )
    assert len({len(one) for one in losses}) > 1
    found = made.whole(model, None)
    assert found["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-10)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["examples"] == 7
    assert set(found) == {"loss", "perplexity", "examples"}


def test_the_adapter_is_what_is_measured(model, adapter) -> None:
    made = Benchmark.of(model, SETTINGS, PLAIN, validation=validation())
    base, other = (made.whole(model, one)["loss"] for one in (None, adapter))
    assert abs(base - other) > 1e-3
    assert made.of_round(model, adapter, 1)["loss"] == pytest.approx(other, abs=1e-12)


def test_a_loss_too_large_for_a_float_has_no_perplexity(model, monkeypatch) -> None:
    rows = Benchmark.of(model, SETTINGS, PLAIN, validation=validation()).validation
    for loss, kept in ((800.0, 800.0), (math.inf, None), (math.nan, None)):
        monkeypatch.setattr(
            "polyrank.evaluation.benchmark.token_losses", lambda *_, loss=loss: [(loss, 1)]
        )
        found = perplexity(model, None, rows, 2)
        assert (found["loss"], found["perplexity"]) == (kept, None)


def test_rows_that_ask_the_same_are_one_case_with_all_references(model) -> None:
    made = Benchmark.of(model, SETTINGS, PLAIN, test=held_out())
    assert [case.prompt for case in made.cases] == ["w4", "w5", "w6", "w7"]
    assert [case.references for case in made.cases] == [
        ("w40 w41", "w42 w43"),
        ("w41 w42",),
        ("w43 w44", "w44 w45", "w46 w47"),
        ("w45 w46",),
    ]


def test_texts_are_what_the_model_would_say_scored_against_all_references(model, adapter) -> None:
    made = Benchmark.of(model, SETTINGS, PLAIN, test=held_out())
    said = {text["prompt"]: text["text"] for text in made.whole(model, adapter)["texts"]}
    assert [*said] == ["w4", "w5", "w6", "w7"]
    told = tasks_from_rows(  # Two of four are asked for what is said, one as second reference.
        {"input": input, "output": output}
        for input, output in (
            ("w4", "w90"),
            ("w4", said["w4"]),
            ("w7", said["w7"]),
            ("w5", "w90"),
            ("w6", "w90"),
        )
    )
    found = Benchmark.of(model, SETTINGS, PLAIN, test=told).whole(model, adapter)
    assert found["rouge_l"] == 0.5
    assert found["generated"] == 4
    references = [["w90", said["w4"]], [said["w7"]], ["w90"], ["w90"]]
    expected = corpus_scores([said[key] for key in ("w4", "w7", "w5", "w6")], references)
    assert (found["bleu"], found["nist"]) == (expected.bleu, expected.nist)
    assert found["nist"] > 0


def test_what_is_drawn_depends_on_the_seed_alone_and_keeps_its_order(model) -> None:
    few = replace(SETTINGS, examples=3, final_examples=5, generate=2)

    def drawn(seed: int) -> tuple[list[int], list[int], list[str]]:
        made = Benchmark.of(model, few, PLAIN, validation=validation(), test=held_out(), seed=seed)
        rows = ([row.example for row in part] for part in (made.between, made.validation))
        return *rows, [case.prompt for case in made.cases]

    between, final, prompts = drawn(0)
    assert (len(between), len(final), len(prompts)) == (3, 5, 2)
    assert drawn(0) == (between, final, prompts)
    assert set(between) < set(final)  # So that the larger part says of the smaller one too.
    assert sorted(between) == between
    assert any(drawn(seed) != (between, final, prompts) for seed in (1, 2, 3))


def test_a_round_is_measured_when_it_is_due(model, adapter) -> None:
    made = Benchmark.of(model, replace(SETTINGS, every=2), PLAIN, validation=validation())
    assert [made.of_round(model, adapter, n) is not None for n in (1, 2, 3, 4)] == [
        False,
        True,
        False,
        True,
    ]
    never = Benchmark.of(model, replace(SETTINGS, every=0), PLAIN, validation=validation())
    assert never.of_round(model, adapter, 2) is None
    texts = Benchmark.of(model, SETTINGS, PLAIN, test=held_out())
    assert texts.of_round(model, adapter, 1) is None


def test_what_cannot_be_used_is_named(model) -> None:
    long = tasks_from_rows([{"input": "w4", "output": "w5"}, {"input": "w6", "output": "w7 " * 40}])
    made = Benchmark.of(model, SETTINGS, replace(PLAIN, max_length=20), validation=long)
    assert made.skipped.rows == {"too long": ["benchmark.validation row 1"]}
    room = model.spec.context - SETTINGS.max_new_tokens
    crowded = tasks_from_rows(
        [{"input": "w4", "output": "w5"}, {"input": "w6 " * (room + 1), "output": "w7"}]
    )
    made = Benchmark.of(model, SETTINGS, PLAIN, test=crowded)
    assert made.skipped.rows == {NO_ROOM: ["benchmark.test row 1"]}
    assert len(made.cases) == 1
    with pytest.raises(DataError, match=r"benchmark\.validation: rows has no usable row: 2 too"):
        Benchmark.of(model, SETTINGS, replace(PLAIN, max_length=2), validation=long)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": -1}, r"benchmark\.every: expected at least 0, got -1"),
        ({"generate": -5}, r"benchmark\.generate: expected at least 0"),
        ({"batch": 0}, r"benchmark\.batch: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        BenchmarkSettings(**changes)


def test_a_benchmark_needs_a_source_and_room_to_generate(model) -> None:
    with pytest.raises(RecipeError, match="give validation, test, or both"):
        Benchmark.of(model, SETTINGS, PLAIN)
    with pytest.raises(RecipeError, match="leave no room for a prompt"):
        Benchmark.of(model, replace(SETTINGS, max_new_tokens=10_000), PLAIN, test=held_out())


def test_its_description_changes_with_settings_and_data(model) -> None:
    made = Benchmark.of(model, SETTINGS, PLAIN, validation=validation(), test=held_out())
    same = Benchmark.of(model, SETTINGS, PLAIN, validation=validation(), test=held_out())
    assert made.described() == same.described()
    others = [
        Benchmark.of(model, SETTINGS, PLAIN, validation=validation(6), test=held_out()),
        Benchmark.of(model, SETTINGS, PLAIN, validation=validation()),
        Benchmark.of(
            model, replace(SETTINGS, examples=2), PLAIN, validation=validation(), test=held_out()
        ),
    ]
    assert len({made.described()["data"], *(one.described()["data"] for one in others)}) == 4


def test_a_target_perplexity_needs_what_measures_it() -> None:
    model = one_block()
    aimed = RunSettings(evaluation=QUIET, target_perplexity=5.0)
    settings = [None, replace(SETTINGS, every=0)]
    for one in settings:
        made = one and Benchmark.of(model, one, PLAIN, validation=validation())
        with pytest.raises(RecipeError, match="target_perplexity: needs the perplexity between"):
            opened(model=model, settings=aimed, benchmark=made)
    with pytest.raises(RecipeError, match=r"target_perplexity: expected at least 1, got 0\.5"):
        RunSettings(target_perplexity=0.5)


def test_measuring_changes_nothing_of_what_is_learnt() -> None:
    model = one_block()
    made = Benchmark.of(model, SETTINGS, PLAIN, validation=validation(), test=held_out())
    run_settings = RunSettings(evaluation=MEASURED, cohort=2)
    found = []
    for one in (None, made):
        with opened(model=model, settings=run_settings, benchmark=one) as run:
            records = list(run.rounds(2))
            found.append((run.finish(), run.adapter.factors, records))
    (bare, without, _), (summary, adapter, records) = found
    for site, delta in adapter.items():
        assert torch.equal(delta.dense(), without[site].dense())
    assert "benchmark" not in bare
    assert summary["benchmark"]["final"]["loss"] == pytest.approx(records[-1].benchmark["loss"])
    assert summary["benchmark"]["base"]["loss"] != records[-1].benchmark["loss"]
