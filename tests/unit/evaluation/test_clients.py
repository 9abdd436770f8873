"""Evaluation: the numbers against a direct computation, and what each group means."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from federations import clients, one_block, opened
from models import random_adapter
from polyrank.aggregation import FlexLoRA
from polyrank.algebra import Adapter, LowRank
from polyrank.data import Example
from polyrank.evaluation import Evaluation
from polyrank.evaluation.clients import SampleText, client_metrics, grouped, summarise
from polyrank.rounds.round import Round
from polyrank.run import RunSettings
from polyrank.training import prepare
from polyrank.training.client_data import at_every_site
from polyrank.training.encoding import Encoding

SETTINGS = Evaluation(examples=0, generate=0, batch=3)


def evaluate(model, adapter, work, part, settings, *, texts):
    """Return the scores of all clients together, as a run groups them."""
    metrics = client_metrics(model, adapter, list(work.values()), part, settings, texts=texts)
    return grouped(metrics, work, part)


@pytest.fixture(scope="module")
def model():
    return one_block(torch.float64)


@pytest.fixture(scope="module")
def work(model):
    return prepare(clients(seen=5, unseen=3), model, Encoding())[0]


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model, 3).scale(0.3)


def direct_loss(model, adapter, rows) -> float:
    """Mean over all target tokens of a client, W + ΔW written into a copy of the weights."""
    weights = {site: model.module.get_submodule(site).weight for site in adapter}
    before = {site: weight.clone() for site, weight in weights.items()}
    losses = []
    with torch.no_grad():
        for site, weight in weights.items():
            weight += adapter[site].dense()
        for row in rows:
            ids = torch.tensor(row.input_ids)
            logits = model.module(input_ids=ids[None]).logits[0]
            targets = ids[row.loss_from :]
            losses.append(cross_entropy(logits[row.loss_from - 1 : -1], targets, reduction="none"))
        for site, weight in weights.items():
            weight.copy_(before[site])
    return float(torch.cat(losses).mean())


def test_losses_are_means_over_tokens_then_over_clients_with_the_standard_error(
    model, work, adapter
):
    found = evaluate(model, adapter, work, "test", SETTINGS, texts=False)
    by_hand = {id: direct_loss(model, adapter, c.rows["test"]) for id, c in work.items()}
    for id, loss in by_hand.items():
        assert found["clients"][id]["loss"] == pytest.approx(loss, abs=1e-10)
    for who, seen in (("seen", True), ("unseen", False)):
        own = [by_hand[id] for id, client in work.items() if client.seen == seen]
        assert found[who]["loss"] == pytest.approx(statistics.fmean(own), abs=1e-10)
        error = math.sqrt(statistics.variance(own) / len(own))
        assert found[who]["loss_se"] == pytest.approx(error, abs=1e-10)
        assert found[who]["clients"] == len(own)
        assert found[who]["exact_match"] is None
    of_a = [by_hand[id] for id, c in work.items() if c.category == "a" and c.seen]
    told = found["per_category"]["a"]["seen"]
    assert told["loss"] == pytest.approx(statistics.fmean(of_a), abs=1e-10)
    assert set(found["per_category"]) == {"a", "b"}


def test_the_base_is_the_adapter_of_zero(model, work, adapter):
    base = evaluate(model, None, work, "test", SETTINGS, texts=False)
    zero = evaluate(model, adapter.scale(0.0), work, "test", SETTINGS, texts=False)
    other = evaluate(model, adapter, work, "test", SETTINGS, texts=False)
    assert base["seen"]["loss"] == pytest.approx(zero["seen"]["loss"], abs=1e-12)
    assert abs(base["seen"]["loss"] - other["seen"]["loss"]) > 1e-3


def test_sites_without_an_update_count_as_zero(model, work, adapter):
    few = adapter.restrict([*adapter][:1])
    whole = Adapter({s: few[s] if s in few else adapter[s].scale(0.0) for s in adapter})
    assert at_every_site(few, model.spec).keys() == adapter.keys()
    got = evaluate(model, few, work, "test", SETTINGS, texts=False)
    expected = evaluate(model, whole, work, "test", SETTINGS, texts=False)
    assert got["seen"]["loss"] == pytest.approx(expected["seen"]["loss"], abs=1e-12)


def test_an_adapter_of_more_rank_than_its_matrices_is_evaluated_as_any_other(model, work, adapter):
    """What a client starts from is a sum, of trained and of frozen factors."""
    rank = max(min(shape) for shape in model.spec.shapes.values())
    wide = Adapter({s: LowRank.stack([d.scale(1 / rank)] * rank) for s, d in adapter.items()})
    assert all(delta.rank > min(delta.shape) for delta in wide.values())
    got = evaluate(model, wide, work, "test", SETTINGS, texts=False)
    expected = evaluate(model, adapter, work, "test", SETTINGS, texts=False)
    assert got["seen"]["loss"] == pytest.approx(expected["seen"]["loss"], abs=1e-10)


def test_the_limit_takes_each_clients_first_examples(model, work, adapter):
    found = evaluate(model, adapter, work, "test", replace(SETTINGS, examples=1), texts=False)
    for id, client in work.items():
        loss = direct_loss(model, adapter, client.rows["test"][:1])
        assert found["clients"][id]["loss"] == pytest.approx(loss, abs=1e-10)


def test_clients_without_an_example_in_the_part_are_left_out(model, work, adapter):
    some = {**work, "c0": replace(work["c0"], rows={**work["c0"].rows, "test": []})}
    found = evaluate(model, adapter, some, "test", SETTINGS, texts=False)
    assert "c0" not in found["clients"]
    assert found["seen"]["clients"] == 4


def test_texts_are_what_the_model_would_say_and_scored_against_the_references(model, work):
    settings = replace(SETTINGS, generate=2, max_new_tokens=2)
    said = {}
    for id, client in work.items():
        texts = []
        for row in client.rows["test"][:2]:
            ids = list(row.input_ids[: row.prompt_length])
            for _ in range(2):
                ids.append(int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            new = ids[row.prompt_length :]
            texts.append(model.tokenizer.decode(new, skip_special_tokens=True))
        said[id] = texts
    knowing = {}
    for id, client in work.items():  # Half of what c0 and u0 are asked has the answer they give.
        examples = list(client.examples["test"])
        if id in ("c0", "u0"):
            examples[0] = replace(examples[0], references=("no", said[id][0]))
        knowing[id] = replace(client, examples={**client.examples, "test": examples})
    found = evaluate(model, None, knowing, "test", settings, texts=True)
    matches = {id: each["exact_match"] for id, each in found["clients"].items()}
    assert matches == {id: 0.5 if id in ("c0", "u0") else 0.0 for id in work}
    assert found["seen"]["exact_match"] == pytest.approx(0.5 / 5)
    assert found["unseen"]["exact_match"] == pytest.approx(0.5 / 3)
    assert found["clients"]["c0"]["rouge_l"] >= 0.5
    clients = list(knowing.values())
    kept = client_metrics(model, None, clients, "test", settings, texts=True, samples=5).samples
    assert [text.client for text in kept] == ["c0", "c1", "u0", "u1", "c2"], "categories a and b"
    first = knowing["c0"].examples["test"][0]
    assert kept[0] == SampleText("c0", first.prompt, "", first.references, said["c0"][0])
    assert kept[2].text == said["u0"][0]
    assert client_metrics(model, None, clients, "test", settings, texts=True).samples == ()


def test_a_long_sample_text_is_shortened():
    long = Example("p" * 900, ("a", "b", "c", "d"), 0)
    sample = SampleText.of("c0", long, "t" * 500)
    assert (len(sample.prompt), sample.prompt[-2:], len(sample.text)) == (500, "p…", 500)
    assert sample.references == ("a", "b", "c")


def test_prompts_that_leave_no_room_for_an_answer_are_passed_over(model, work):
    long = [replace(row, prompt_length=10**6) for row in work["c0"].rows["test"][:1]]
    some = {**work, "c0": replace(work["c0"], rows={**work["c0"].rows, "test": long})}
    settings = replace(SETTINGS, generate=1, max_new_tokens=2)
    found = evaluate(model, None, some, "test", settings, texts=True)
    assert found["clients"]["c0"]["exact_match"] is None
    assert found["clients"]["c0"]["loss"] is not None
    assert found["clients"]["c1"]["exact_match"] is not None


def test_one_client_that_is_not_finite_is_not_averaged_away():
    def score(loss):
        return {"loss": loss, "exact_match": None, "rouge_l": None}

    assert summarise([score(1.0), score(3.0)])["loss"] == 2.0
    spoiled = summarise([score(1.0), score(None)])
    assert (spoiled["loss"], spoiled["loss_se"], spoiled["clients"]) == (None, None, 2)
    assert summarise([])["loss"] is None
    assert summarise([score(1.0)])["loss_se"] is None


def test_own_rank_is_the_loss_with_each_clients_next_assignment(model):
    run_settings = RunSettings(evaluation=replace(SETTINGS, own_rank=True), cohort=4)
    with opened(model=model, data=clients(seen=5), settings=run_settings) as parts:
        (record,) = parts.rounds(1)
        following = Round(parts._round_settings, parts.state, 2, 0, [*parts.ranks])
        losses: dict[str, list[float]] = {}
        for id in parts.seen:
            assigned = following.assignment(id).start.to(dtype=torch.float64)
            loss = direct_loss(model, assigned, parts.work[id].rows["validation"])
            losses.setdefault(parts.fleet.assigned[id], []).append(loss)
    told = record.evaluation["own_rank"]
    for name, own in losses.items():
        assert told[name]["loss"] == pytest.approx(statistics.fmean(own), abs=1e-9)
        assert told[name]["clients"] == len(own)
    everyone = [loss for own in losses.values() for loss in own]
    assert told["all"]["loss"] == pytest.approx(statistics.fmean(everyone), abs=1e-9)
    assert told["small"]["loss"] != pytest.approx(record.evaluation["server"]["seen"]["loss"])


def test_with_the_tail_in_the_base_every_client_has_the_whole_aggregate_at_its_own_rank(model):
    run_settings = RunSettings(evaluation=replace(SETTINGS, own_rank=True), cohort=4)
    rule = FlexLoRA("tail-in-base")
    with opened(model=model, data=clients(seen=5), rule=rule, settings=run_settings) as parts:
        (record,) = parts.rounds(1)
    own, server = record.evaluation["own_rank"], record.evaluation["server"]
    assert own["all"]["loss"] == pytest.approx(server["seen"]["loss"], abs=1e-9)
    base = evaluate(model, None, parts.work, "validation", SETTINGS, texts=False)
    assert abs(base["seen"]["loss"] - own["all"]["loss"]) > 1e-3


def test_rounds_are_measured_on_validation_parts_when_due_and_the_two_ends_on_test_parts(model):
    settings = replace(
        SETTINGS, every=2, own_rank=False, generate=1, generate_every=4, max_new_tokens=2
    )
    with opened(model=model, settings=RunSettings(evaluation=settings, cohort=4)) as parts:
        records = list(parts.rounds(4))
        summary, factors = parts.finish(), parts.adapter.factors

        def measured(adapter, part):
            return evaluate(model, adapter, parts.work, part, settings, texts=True)

        base = parts.base()
        assert [sample["client"] for sample in base.pop("samples")] == [
            "c0",
            "c1",
            "u0",
            "c2",
            "c3",
        ]
        assert base == measured(None, "test")
        assert summary["base"]["seen"]["loss"] == parts.base()["seen"]["loss"]
        final = measured(factors, "test")
        for who in ("seen", "unseen"):
            for score in ("loss", "loss_se", "exact_match", "rouge_l"):
                assert summary["final"][who][score] == final[who][score]
        assert summary["per_category"] == final["per_category"]
        assert [record.evaluation is not None for record in records] == [False, True, False, True]
        assert records[1].evaluation["server"]["seen"]["exact_match"] is None, "no texts yet"
        assert records[3].evaluation["server"] == measured(factors, "validation")
