"""Full fine-tuning: whole matrices trained and averaged."""

import dataclasses

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import federations
from aggregation_rounds import (
    SITE,
    distance,
    fleet,
    fresh_state,
    no_training,
    noisy_training,
    play,
    product,
    widened,
)
from jobs import examples
from models import PAD, tiny_loaded
from polyrank.aggregation import FleetSpec, Full, SLoRA, assign
from polyrank.algebra import Dense, LowRank
from polyrank.errors import RuleError, SiteError, UpdateError
from polyrank.run import RunSettings
from polyrank.training import Job, LocalTraining, train_cohort
from polyrank.training.batches import step_groups

SHAPE = (14, 11)
RULE = Full()
LOCAL = LocalTraining(lr=1e-2, epochs=None, steps=6, batch=4, clip=0.3, schedule="linear")


def test_the_next_matrix_is_the_weighted_mean_of_the_clients_whatever_their_ranks():
    clients = fleet([1, 2, 8], weights=[0.5, 0.3, 0.2])
    state = widened(fresh_state(RULE, SHAPE, clients))
    for t in range(2):
        training = noisy_training(t)
        assigned = RULE.assign_site(state, SITE, 1, 1.0, t)
        expected = sum(c.weight * training(i, assigned).dense() for i, c in enumerate(clients))
        state, report = play(RULE, state, clients, training, seed=t)
        assert distance(product(RULE, state), expected) < 1e-14
        assert report.energy == pytest.approx(float(expected.square().sum()))
        assert report.discarded == 0.0
    idle, _ = play(RULE, state, clients, no_training)
    assert distance(product(RULE, idle), product(RULE, state)) < 1e-14


def _train_weights(model, rows, local, seed):
    """Ordinary training of the very weights, from `rows`; return what they changed by, m×n."""
    weights = {s: model.module.get_submodule(s).weight for s in model.spec.shapes}
    before = {site: weight.detach().clone() for site, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), local.lr, weight_decay=0.0)
    steps = local.steps_for(len(rows))
    for step, [micro] in enumerate(step_groups(len(rows), local, seed)):
        if step == steps:
            break
        chosen = [rows[i] for i in micro]
        longest = max(len(row.input_ids) for row in chosen)
        ids = torch.full((len(chosen), longest), PAD)
        labels = torch.full((len(chosen), longest), -100)
        for i, row in enumerate(chosen):
            tokens = torch.tensor(row.input_ids)
            ids[i, : len(tokens)] = tokens
            labels[i, row.loss_from : len(tokens)] = tokens[row.loss_from :]
        logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), local.clip)
        optimizer.param_groups[0]["lr"] = local.rate(step, steps)
        optimizer.step()
    found = {}
    for site, weight in weights.items():
        change = (weight - before[site]).detach()
        found[site] = change.T if isinstance(model.module.get_submodule(site), Conv1D) else change
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_client_trains_what_ordinary_training_of_the_weights_trains(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    shapes = model.spec.shapes
    ranks = dict.fromkeys(shapes, 1)
    state = widened(RULE.init(FleetSpec(shapes, {"a": ranks}, ranks, 0)))
    rows = examples(19, seed=3)
    assignment = assign(RULE, state, ranks, dict.fromkeys(ranks, 16.0), 0)
    [trained] = train_cohort(model, [Job("a", assignment, rows, LOCAL, seed=5)])
    plain = tiny_loaded(architecture, dtype=torch.float64)
    expected = _train_weights(plain, rows, LOCAL, seed=5)
    for site, change in expected.items():
        assert float(change.abs().max()) > 1e-2, "it has to learn something"
        # float64; W + D and a weight that was changed differ in rounding, which AdamW may enlarge.
        assert float((trained.adapter[site].dense() - change).abs().max()) < 1e-9


def test_a_run_with_mixed_ranks_learns_and_ends_with_whole_matrices(tmp_path):
    local = dataclasses.replace(federations.LOCAL, lr=1e-2, dropout=0.0)
    run_settings = RunSettings(evaluation=federations.MEASURED, cohort=2)
    with federations.opened(tmp_path / "run", rule=RULE, local=local, settings=run_settings) as run:
        records = list(run.rounds(2))
        summary = run.finish()
        factors = run.adapter.factors
    assert {type(delta) for delta in factors.values()} == {Dense}
    assert summary["method"] == "full"
    assert summary["final"]["seen"]["loss"] < summary["base"]["seen"]["loss"]
    whole = sum(4 * m * n for m, n in run.model.spec.shapes.values())
    for record in records:  # All hold all sites here; D travels whole both ways.
        assert record.bytes_up == record.bytes_down == len(record.clients) * whole
    assert 0 < summary["adapter_lost"] < 1, "factors of the server's rank are not all of it"


def test_what_does_not_fit_is_refused_with_the_place():
    clients = fleet([2, 2])
    state = fresh_state(RULE, SHAPE, clients)
    with pytest.raises(
        UpdateError, match=f"0 at '{SITE}': expected a dense update of .14, 11.*LowR"
    ):
        play(RULE, state, clients, lambda *_: LowRank.zero(*SHAPE))
    with pytest.raises(UpdateError, match=r"got Dense of \(11, 14\)"):
        play(RULE, state, clients, lambda *_: Dense(torch.zeros(11, 14)))
    with pytest.raises(SiteError, match="full: no site 'elsewhere'"):
        RULE.assign_site(state, "elsewhere", 2, 1.0, 0)
    with pytest.raises(RuleError, match="no factors to start"):
        SLoRA(RULE, 2)
