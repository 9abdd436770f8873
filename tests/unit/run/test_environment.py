"""What a run's bytes depend on, and how a change of it is told."""

import json
from dataclasses import replace

import pytest
import torch

from federations import clients, one_block
from polyrank.aggregation import FlexLoRA
from polyrank.errors import InexactResumeError, RunError
from polyrank.run import environment
from polyrank.training import prepare
from polyrank.training.client_data import fingerprint
from polyrank.training.encoding import Encoding


@pytest.fixture(scope="module")
def model():
    return one_block()


def test_environment_survive_json(model):
    told = environment.describe(model, "d" * 64, {"betas": (0.9, 0.99), "cohort": 2}, FlexLoRA())
    assert json.loads(json.dumps(told)) == told
    assert told["versions"]["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()


def test_the_fingerprint_of_a_model_changes_with_one_bit_and_with_its_configuration(model):
    before = environment.fingerprint(model)
    assert environment.fingerprint(one_block()) == before
    weight = model.module.model.embed_tokens.weight
    kept = weight[50, 3].item()
    with torch.no_grad():
        weight[50, 3] = kept * (1 + 2**-22)
        assert environment.fingerprint(model) != before
        weight[50, 3] = kept
    assert environment.fingerprint(model) == before
    base = model.module.config.rms_norm_eps
    model.module.config.rms_norm_eps = 0.5
    assert environment.fingerprint(model) != before
    model.module.config.rms_norm_eps = base


def test_the_fingerprint_depends_neither_on_threads_nor_on_where_the_model_came_from(model):
    before, threads = environment.fingerprint(model), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert environment.fingerprint(replace(model, source="elsewhere")) == before
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_number_format_has_a_fingerprint(dtype):
    assert len(environment.fingerprint(one_block(dtype))) == 64


def with_reference(client):
    """Return the client with one more acceptable answer to its first test example."""
    first, *rest = client.test
    return replace(client, test=(replace(first, references=(*first.references, "or this")), *rest))


def test_the_fingerprint_of_the_data_tells_apart_what_training_and_scores_read(model):
    data = clients()
    known = {
        name: fingerprint(prepare(given, model, encoding)[0])
        for name, given, encoding in (
            ("as is", data, Encoding()),
            ("loss on all", data, Encoding(loss_on="all")),
            ("another reference", {**data, "c0": with_reference(data["c0"])}, Encoding()),
            ("another category", {**data, "c0": replace(data["c0"], category="z")}, Encoding()),
            (
                "one fewer",
                {**data, "c0": replace(data["c0"], train=data["c0"].train[1:])},
                Encoding(),
            ),
            (
                "parts swapped",
                {
                    **data,
                    "c0": replace(
                        data["c0"], test=data["c0"].validation, validation=data["c0"].test
                    ),
                },
                Encoding(),
            ),
        )
    }
    assert len(set(known.values())) == len(known)
    assert known["as is"] == fingerprint(prepare(data, model, Encoding())[0])


OLD = {"schema": 1, "threads": 2, "model": {"source": "a", "fingerprint": "f"}, "new": {}}


def test_every_difference_is_named_and_nothing_else():
    now = {**OLD, "threads": 4, "model": {"source": "b", "fingerprint": "g"}, "extra": 1}
    with pytest.raises(InexactResumeError) as caught:
        environment.carried_over(OLD, now, round=3, allow_inexact=False)
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.strip() for line in lines] == [
        "extra: was None, is 1",
        "model.fingerprint: was 'f', is 'g'",
        "threads: was 2, is 4",
    ]
    assert "--allow-inexact" in str(caught.value)


def test_the_same_environment_stays_as_it_was():
    now = {**OLD, "model": {"source": "moved", "fingerprint": "f"}}
    assert environment.carried_over(OLD, now, round=3, allow_inexact=False) == OLD


def test_what_was_allowed_to_differ_is_noted_each_time():
    first = environment.carried_over(OLD, {**OLD, "threads": 4}, round=3, allow_inexact=True)
    second = environment.carried_over(first, {**OLD, "threads": 1}, round=5, allow_inexact=True)
    assert second["threads"] == 1
    assert [(n["after_round"], n["differences"]) for n in second["inexact"]] == [
        (3, ["threads: was 2, is 4"]),
        (5, ["threads: was 4, is 1"]),
    ]
    again = {**OLD, "threads": 1}
    assert environment.carried_over(second, again, round=6, allow_inexact=False) == second


@pytest.mark.parametrize("found", [None, [], {}, {"schema": 2}])
def test_another_layout_is_refused(tmp_path, found):
    with pytest.raises(RunError, match=r"run\.json: expected schema 1"):
        environment.check_schema(found, tmp_path / "run.json")
