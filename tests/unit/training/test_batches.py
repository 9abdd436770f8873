"""The order of examples, the shape of batches, the schedule, and what a recipe refuses."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization

from jobs import examples
from models import PAD
from polyrank.errors import RecipeError
from polyrank.training import LocalTraining
from polyrank.training.batches import assemble, step_groups

sizes = st.integers(1, 40)


@given(sizes, st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_shows_every_example_once(count, batch, accumulation, epochs, seed):
    local = LocalTraining(epochs=epochs, batch=batch, accumulation=accumulation)
    groups = list(step_groups(count, local, seed))
    assert len(groups) == local.steps_for(count)
    per_epoch = len(groups) // epochs
    for epoch in range(epochs):
        own = groups[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for group in own for micro in group for i in micro) == list(range(count))
        assert all(len(group) <= accumulation for group in own)
        full = [micro for group in own for micro in group][:-1]
        assert all(len(micro) == batch for micro in full)


@given(sizes, st.integers(1, 9), st.integers(1, 4), st.floats(0.01, 5))
def test_a_number_of_epochs_gives_the_trainers_number_of_steps(count, batch, accumulation, epochs):
    batches = math.ceil(count / batch)
    updates = max(batches // accumulation + int(batches % accumulation > 0), 1)  # Trainer's words
    local = LocalTraining(epochs=epochs, batch=batch, accumulation=accumulation)
    assert local.steps_for(count) == math.ceil(epochs * updates)
    assert len(list(step_groups(count, local, 0))) == local.steps_for(count)


def test_a_number_of_steps_goes_round_the_data_and_stops_there():
    local = LocalTraining(epochs=None, steps=7, batch=4)
    groups = list(step_groups(10, local, 3))
    assert [len(micro) for group in groups for micro in group] == [4, 4, 2, 4, 4, 2, 4]
    assert groups[0] != groups[3]


def test_the_order_depends_on_the_seed_and_differs_from_epoch_to_epoch():
    local = LocalTraining(epochs=2, batch=20)
    one, again, other = (list(step_groups(20, local, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0] != one[1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 10), (0.3, 10), (0.25, 3), (0.9, 1)])
def test_rates_are_those_of_transformers(schedule, warmup, steps):
    make = {
        "constant": lambda opt, warm: optimization.get_constant_schedule_with_warmup(opt, warm),
        "linear": lambda opt, warm: optimization.get_linear_schedule_with_warmup(opt, warm, steps),
        "cosine": lambda opt, warm: optimization.get_cosine_schedule_with_warmup(opt, warm, steps),
    }
    local = LocalTraining(lr=0.2, schedule=schedule, warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = make[schedule](optimizer, int(warmup * steps))
    for step in range(steps):
        assert local.rate(step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_client_of_few_steps_has_no_warm_up_that_would_eat_them():
    assert LocalTraining(warmup=0.1).rate(0, 1) == LocalTraining().lr


def test_assembled_targets_are_the_next_tokens_of_the_completions():
    rows = examples(4)
    put = assemble(rows, PAD, torch.device("cpu"))
    length = put.input_ids.shape[1]
    expected = [
        (i * length + t - 1, row.input_ids[t])
        for i, row in enumerate(rows)
        for t in range(row.loss_from, len(row.input_ids))
    ]
    assert list(zip(put.positions.tolist(), put.targets.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("schedule", "step"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("epochs", -1),
        ("steps", 2.5),
        ("batch", 0),
        ("batch", 1.5),
        ("accumulation", 0),
        ("clip", -1.0),
        ("warmup", 1.0),
        ("weight_decay", -0.1),
        ("dropout", 1.0),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("momentum", -0.5),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(field, value):
    with pytest.raises(RecipeError, match=field):
        dataclasses.replace(LocalTraining(), **{field: value})


def test_an_epoch_is_the_length_where_none_is_given_and_both_are_refused():
    assert LocalTraining().steps_for(20) == LocalTraining(epochs=1).steps_for(20) == 3
    assert LocalTraining(steps=5).steps_for(20) == 5
    with pytest.raises(RecipeError, match="epochs or steps, not both"):
        LocalTraining(epochs=1, steps=5)


def test_no_steps_is_refused():
    with pytest.raises(RecipeError, match="steps"):
        LocalTraining(epochs=None, steps=0)
