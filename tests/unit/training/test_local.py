"""Local training in a cohort: independence of the cohort, the numbers returned, the errors."""

import dataclasses
import hashlib
import re

import pytest
import torch

from jobs import by_group, examples, job
from models import random_adapter, tiny_loaded
from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter
from polyrank.errors import DataError, SiteError
from polyrank.training import Job, LocalTraining, token_losses, train_cohort


def distance(one: Adapter, other: Adapter) -> float:
    return max(
        max((one[s].b - other[s].b).abs().max().item(), (one[s].a - other[s].a).abs().max().item())
        for s in one
    )


def several(model) -> list[Job]:
    fast = LocalTraining(lr=1e-2, epochs=None, steps=6, batch=3, dropout=0.2, accumulation=2)
    return [
        job(model, "a", ranks=by_group(model, 1, 4), count=11, seed=1, frozen=2, local=fast),
        job(model, "b", ranks=3, count=5, seed=2, local=LocalTraining(lr=1e-2, batch=2)),
        job(
            model,
            "c",
            ranks=2,
            count=30,
            seed=3,
            local=LocalTraining(optimizer="sgd", lr=0.1, batch=4, dropout=0.4),
        ),
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_a_client_gets_the_same_alone_and_in_any_cohort_in_any_order(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    jobs = several(model)
    alone = [train_cohort(model, [one])[0] for one in jobs]
    together = train_cohort(model, jobs)
    turned = train_cohort(model, jobs[::-1])[::-1]
    for i in range(len(jobs)):
        for found in (together[i], turned[i]):
            # float64, sums in another order
            assert distance(found.adapter, alone[i].adapter) < 1e-10
            assert found.metrics == pytest.approx(alone[i].metrics, rel=1e-9)


def test_the_same_jobs_give_the_same_bytes_again():
    model = tiny_loaded("llama")
    jobs = several(model)
    first, again = train_cohort(model, jobs), train_cohort(model, jobs)
    assert [t.adapter.hash() for t in first] == [t.adapter.hash() for t in again]
    assert [t.metrics for t in first] == [t.metrics for t in again]


def test_a_client_that_has_finished_is_not_touched_any_more():
    """Bit by bit: the long client beside it goes on for twenty steps more or does not."""
    model = tiny_loaded("llama")
    short = job(model, "short", count=4, seed=1, local=LocalTraining(batch=2, weight_decay=0.1))
    steps = [LocalTraining(epochs=None, steps=n, batch=2, weight_decay=0.1) for n in (2, 22)]
    beside = [job(model, "long", count=4, seed=2, local=local) for local in steps]
    ended = [train_cohort(model, [short, one])[0].adapter.hash() for one in beside]
    assert ended[0] == ended[1]


def test_training_lowers_the_loss_and_reports_it():
    model = tiny_loaded("llama", dtype=torch.float64)
    one = job(model, count=8, ranks=4, local=LocalTraining(lr=3e-2, epochs=40, batch=8, clip=0))
    trained = train_cohort(model, [one])[0]
    targets = sum(row.targets for row in one.examples)

    def loss(adapter: Adapter) -> float:
        return sum(total for total, _ in token_losses(model, adapter, one.examples, 8)) / targets

    assert trained.metrics["first_loss"] == pytest.approx(loss(one.assignment.start), rel=1e-12)
    assert trained.metrics["last_loss"] < 0.9 * trained.metrics["first_loss"]
    assert loss(trained.adapter) < trained.metrics["last_loss"]
    assert trained.metrics["steps"] == 40
    assert trained.metrics["target_tokens"] == 40 * targets
    assert trained.metrics["tokens"] == 40 * sum(len(row.input_ids) for row in one.examples)


def test_the_loss_is_a_mean_per_token_over_the_accumulated_step_not_of_means():
    """Four microbatches of two in a step give what one batch of eight gives."""
    model = tiny_loaded("llama", dtype=torch.float64)
    whole = job(model, count=8, local=LocalTraining(lr=1e-2, batch=8, epochs=3))
    parts = dataclasses.replace(
        whole, local=LocalTraining(lr=1e-2, batch=2, accumulation=4, epochs=3)
    )
    one, other = train_cohort(model, [whole, parts])
    assert distance(one.adapter, other.adapter) < 1e-10


def test_a_frozen_term_is_active_and_not_trained():
    model = tiny_loaded("llama", dtype=torch.float64)
    one = job(model, count=4, frozen=2, local=LocalTraining(batch=4, epochs=2))
    before = one.assignment.frozen.hash()
    trained = train_cohort(model, [one])[0]
    both = one.assignment.start + one.assignment.frozen
    losses = token_losses(model, both, one.examples, 4)
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert trained.metrics["first_loss"] == pytest.approx(expected, rel=1e-12)
    assert one.assignment.frozen.hash() == before
    assert trained.adapter.ranks == one.assignment.ranks


def test_a_bfloat16_base_trains_and_its_adapters_are_float32():
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    local = LocalTraining(lr=3e-2, epochs=30, batch=8, dropout=0.05)
    jobs = [
        dataclasses.replace(one, assignment=_float32(one.assignment))
        for one in (job(model, "a", ranks=4, count=8, local=local), job(model, "b", local=local))
    ]
    for trained in train_cohort(model, jobs):
        assert trained.metrics["last_loss"] < 0.95 * trained.metrics["first_loss"]
        assert {delta.b.dtype for delta in trained.adapter.values()} == {torch.float32}
        assert all(delta.is_finite() for delta in trained.adapter.values())


def _float32(assignment: Assignment) -> Assignment:
    return dataclasses.replace(assignment, start=assignment.start.to(dtype=torch.float32))


def test_neither_base_nor_assignment_is_written():
    model = tiny_loaded("gpt2")
    jobs = several(model)

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for tensor in model.module.state_dict().values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    base, sent = fingerprint(), [one.assignment.hash() for one in jobs]
    train_cohort(model, jobs)
    assert fingerprint() == base
    assert [one.assignment.hash() for one in jobs] == sent
    assert not any(child._forward_hooks for child in model.module.modules())


def test_progress_is_told_once_per_step_of_each_client():
    model = tiny_loaded("llama")
    jobs, ticks = several(model), []
    trained = train_cohort(model, jobs, lambda: ticks.append(1))
    assert len(ticks) == sum(one.metrics["steps"] for one in trained)


def test_a_loss_that_is_not_finite_ends_its_client_alone_and_leaves_no_hook():
    model = tiny_loaded("llama")
    healthy = job(model, "healthy", count=12, local=LocalTraining(batch=2))
    wild = job(
        model,
        "wild",
        count=12,
        local=LocalTraining(optimizer="sgd", lr=1e30, batch=2, clip=0),
        seed=1,
    )
    kept, gone = train_cohort(model, [healthy, wild])
    assert re.match(r"client wild, step [2-6] of 6", gone.failure)
    assert gone.metrics == {}
    assert all(delta.is_finite() for delta in gone.adapter.values())
    (alone,) = train_cohort(model, [healthy])
    assert kept.failure is None
    assert kept.metrics == pytest.approx(alone.metrics, rel=1e-5)  # float32, another batch
    assert distance(kept.adapter, alone.adapter) < 1e-5
    assert not any(child._forward_hooks for child in model.module.modules())


def test_a_start_that_is_not_finite_is_caught_at_the_first_step():
    model = tiny_loaded("llama")
    start = random_adapter(model, 2).scale(float("nan"))
    one = Job("nan", Assignment(start, dict.fromkeys(start, 1.0)), examples(3), LocalTraining(), 0)
    (found,) = train_cohort(model, [one])
    assert found.failure.startswith("client nan, step 1 of 1")


def test_a_client_without_examples_is_an_error_and_no_clients_are_none():
    model = tiny_loaded("llama")
    with pytest.raises(DataError, match="client empty"):
        train_cohort(model, [job(model), job(model, "empty", count=0)])
    assert train_cohort(model, []) == []


def test_an_assignment_that_lacks_a_site_is_an_error_not_dropped():
    model = tiny_loaded("llama")
    one = job(model)
    few = list(one.assignment.start)[1:]
    start = one.assignment.start.restrict(few)
    short = dataclasses.replace(one, assignment=Assignment(start, dict.fromkeys(few, 1.0)))
    with pytest.raises(SiteError, match="missing"):
        train_cohort(model, [short])
