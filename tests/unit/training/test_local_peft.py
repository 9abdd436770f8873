"""Training in a cohort gives what peft and torch.optim give, client by client."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import optimization

from dense_oracle import assigned
from jobs import by_group, job
from models import PAD, tiny, tiny_loaded
from polyrank.algebra import Adapter, LowRank
from polyrank.model import LoadedModel
from polyrank.model.dropout import keep_mask
from polyrank.training import Job, LocalTraining, train_cohort
from polyrank.training.batches import step_groups

TOLERANCE = 1e-9  # float64; both sides sum in another order, which AdamW may enlarge a little


class SameMasks(nn.Module):
    """In the place of peft's dropout: the masks that polyrank draws for this client and site."""

    draw: tuple[int, int] = (0, 0)  # of all sites at once: set on the class before each pass

    def __init__(self, seed: int, site: str, probability: float):
        super().__init__()
        self.seed, self.site, self.probability = seed, site, probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], x.shape[2])
        return x * keep_mask(self.seed, self.draw, self.site, shape, self.probability, x)


def wrap(architecture: str, one: Job, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Return a fresh model adapted by peft, with the job's factors, scales and dropout."""
    start, scale, local = one.assignment.start, one.assignment.scale, one.local
    config = LoraConfig(
        r=1,
        target_modules=list(start),
        rank_pattern={site: start[site].rank for site in start},
        alpha_pattern={site: scale[site] * start[site].rank for site in start},
        lora_dropout=local.dropout,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that Conv1D is stored transposed
        adapted = get_peft_model(
            tiny(architecture, dtype=dtype), config, autocast_adapter_dtype=False
        )
    adapted.eval()  # the base's own dropout stays off
    with torch.no_grad():
        for site in start:
            layer = adapted.base_model.model.get_submodule(site)
            assert layer.scaling["default"] == pytest.approx(scale[site], rel=1e-15)
            layer.lora_A["default"].weight.copy_(start[site].a)
            layer.lora_B["default"].weight.copy_(start[site].b / scale[site])
            if local.dropout:
                layer.lora_dropout["default"] = SameMasks(one.seed, site, local.dropout)
    return adapted


def make_scheduler(local: LocalTraining, optimizer: torch.optim.Optimizer, steps: int):
    warm = int(local.warmup * steps)
    if local.schedule == "linear":
        return optimization.get_linear_schedule_with_warmup(optimizer, warm, steps)
    if local.schedule == "cosine":
        return optimization.get_cosine_schedule_with_warmup(optimizer, warm, steps)
    return optimization.get_constant_schedule_with_warmup(optimizer, warm)


def train_with_peft(architecture: str, one: Job) -> tuple[Adapter, float]:
    """Train the job alone with peft; return the factors, s folded into B, and the mean loss."""
    local, start = one.local, one.assignment.start
    adapted = wrap(architecture, one)
    if one.assignment.train == "b":
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    if local.resolved.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            trained, local.lr, local.betas, local.eps, weight_decay=local.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            trained, local.lr, local.momentum, weight_decay=local.weight_decay
        )
    scheduler = make_scheduler(local, optimizer, local.steps_for(len(one.examples)))
    summed, seen = 0.0, 0
    for step, group in enumerate(step_groups(len(one.examples), local, one.seed)):
        optimizer.zero_grad()
        targets = sum(one.examples[i].targets for micro in group for i in micro)
        for number, micro in enumerate(group):
            rows = [one.examples[i] for i in micro]
            longest = max(len(row.input_ids) for row in rows)
            ids = torch.full((len(rows), longest), PAD)
            labels = torch.full((len(rows), longest), -100)
            mask = torch.zeros(len(rows), longest, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
                mask[i, : len(row.input_ids)] = 1
                labels[i, row.loss_from : len(row.input_ids)] = torch.tensor(
                    row.input_ids[row.loss_from :]
                )
            SameMasks.draw = (step, number)
            logits = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / targets).backward()
            summed += loss.item()
        seen += targets
        if local.clip:
            nn.utils.clip_grad_norm_(trained, local.clip)
        optimizer.step()
        scheduler.step()
    deltas = {}
    for site in start:
        layer = adapted.base_model.model.get_submodule(site)
        b = layer.lora_B["default"].weight.detach() * one.assignment.scale[site]
        deltas[site] = LowRank(b, layer.lora_A["default"].weight.detach())
    return Adapter(deltas), summed / seen


def distance(one: Adapter, other: Adapter) -> float:
    """Return the largest difference between entries of factors."""
    assert set(one) == set(other)
    return max(
        max((one[s].b - other[s].b).abs().max().item(), (one[s].a - other[s].a).abs().max().item())
        for s in one
    )


def unequal_jobs(model: LoadedModel) -> list[Job]:
    """Four clients that differ in all that may differ from client to client."""
    return [
        job(
            model,
            "warm-up, decay, clipped, dropout",
            ranks=by_group(model, 2, 4),
            scale=0.5,
            count=13,
            seed=1,
            local=LocalTraining(
                lr=1e-2,
                epochs=None,
                steps=10,
                batch=4,
                clip=0.3,
                warmup=0.2,
                schedule="linear",
                weight_decay=0.1,
                dropout=0.1,
            ),
        ),
        job(
            model,
            "sgd with momentum, accumulated",
            ranks=1,
            scale=16.0,
            count=7,
            seed=2,
            local=LocalTraining(
                optimizer="sgd",
                lr=0.05,
                epochs=None,
                steps=12,
                batch=3,
                accumulation=2,
                clip=0,
                schedule="cosine",
                weight_decay=0.01,
                momentum=0.9,
            ),
        ),
        job(
            model,
            "hard clip, much dropout, fewer steps",
            ranks=5,
            scale=2.0,
            count=21,
            seed=3,
            local=LocalTraining(
                lr=3e-3, epochs=None, steps=7, batch=5, clip=0.05, dropout=0.3, betas=(0.8, 0.99)
            ),
        ),
        job(
            model,
            "epochs and a half, accumulated, dropout",
            ranks=by_group(model, 3, 1),
            scale=1.0,
            count=9,
            seed=4,
            local=LocalTraining(
                lr=1e-2, epochs=2.5, batch=2, accumulation=2, dropout=0.2, eps=1e-6
            ),
        ),
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "phi3"])
def test_a_cohort_of_unequal_clients_equals_peft_trained_client_by_client(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    jobs = unequal_jobs(model)
    for one, trained in zip(jobs, train_cohort(model, jobs), strict=True):
        expected, loss = train_with_peft(architecture, one)
        assert distance(trained.adapter, one.assignment.start) > 1e-3, "it has to learn something"
        assert distance(trained.adapter, expected) < TOLERANCE, one.client
        assert trained.metrics["loss"] == pytest.approx(loss, rel=1e-9)
        assert trained.adapter.ranks == one.assignment.ranks


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_clients_that_train_b_alone_equal_peft_with_a_frozen(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    jobs = [assigned(one, train="b") for one in unequal_jobs(model)]
    for one, trained in zip(jobs, train_cohort(model, jobs), strict=True):
        expected, loss = train_with_peft(architecture, one)
        assert distance(trained.adapter, one.assignment.start) > 1e-3, "it has to learn something"
        assert distance(trained.adapter, expected) < TOLERANCE, one.client
        assert trained.metrics["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "phi3"])
def test_one_client_equals_peft(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    one = unequal_jobs(model)[0]
    expected, _ = train_with_peft(architecture, one)
    assert distance(train_cohort(model, [one])[0].adapter, expected) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activation_checkpointing_changes_nothing(architecture):
    plain = tiny_loaded(architecture, dtype=torch.float64)
    saving = tiny_loaded(architecture, dtype=torch.float64, checkpointing=True)
    jobs = unequal_jobs(plain)
    pairs = zip(train_cohort(plain, jobs), train_cohort(saving, jobs), strict=True)
    for one, other in pairs:
        assert distance(one.adapter, other.adapter) < 1e-12


def test_without_the_masks_the_factors_would_differ():
    """The comparison above can fail: without the masks the factors differ."""
    model = tiny_loaded("llama", dtype=torch.float64)
    one = unequal_jobs(model)[0]
    expected, _ = train_with_peft("llama", one)
    undropped = LocalTraining(**{**vars(one.local), "dropout": 0.0})
    without = Job(one.client, one.assignment, one.examples, undropped, one.seed)
    assert distance(train_cohort(model, [without])[0].adapter, expected) > 1e-4
