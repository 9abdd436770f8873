"""A federation against FlexLoRA written out here: peft client by client, dense SVD, float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import federations
from polyrank.aggregation import FlexLoRA
from polyrank.aggregation.client_factors import initial_rows
from polyrank.run import RunSettings
from polyrank.seeds import derive
from polyrank.training import LocalTraining

ROUNDS = 3
SCALE = 2.0  # α = 2r, the default
LOCAL = LocalTraining(lr=0.03, batch=32, epochs=None, steps=3, weight_decay=0.01, clip=0.5)
"""Batches hold a client's examples all at once, so that no order has to be agreed on."""


def federated(mode: str, cohort: int):
    """Return the products per site after each round, and the federation's own parts."""
    parts = federations.opened(
        model=federations.one_block(torch.float64),
        rule=FlexLoRA(mode),
        local=LOCAL,
        settings=RunSettings(seed=5, evaluation=federations.QUIET, cohort=cohort),
    )
    found = []
    with parts:
        for _ in parts.rounds(ROUNDS):
            found.append({site: d.dense() for site, d in parts.adapter.factors.items()})
    return found, parts


def by_hand(mode: str, parts) -> list[dict[str, torch.Tensor]]:
    """The same from the model, the token ids and the ranks alone."""
    shapes, clients = parts.model.spec.shapes, sorted(parts.ranks)
    server = {site: max(parts.ranks[c][site] for c in clients) for site in shapes}
    examples = {c: len(parts.work[c].rows["train"]) for c in clients}
    d = {site: torch.zeros(shape, dtype=torch.float64) for site, shape in shapes.items()}
    found = []
    for number in range(1, ROUNDS + 1):
        total = {site: torch.zeros_like(matrix) for site, matrix in d.items()}
        for client in clients:
            ranks = parts.ranks[client]
            assigned = {s: assign(d[s], ranks[s], s, number) for s in shapes}
            start = {s: SCALE * b @ a for s, (b, a) in assigned.items()}
            tail = {s: d[s] - start[s] for s in shapes} if mode == "tail-in-base" else {}
            trained = train(parts.model.module, ranks, assigned, tail, parts.work[client])
            for s, (b, a) in trained.items():
                update = SCALE * b @ a
                if mode != "replace":
                    update = d[s] + update - start[s]
                total[s] += examples[client] / sum(examples.values()) * update
        d = {s: truncated(total[s], server[s]) for s in shapes}
        found.append(d)
    return found


def truncated(d, rank):
    u, sigma, vt = torch.linalg.svd(d, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def assign(d, rank, site, number):
    """B = UΣ/s and A = Vᵀ; before the first round B = 0 and A fresh, in float32 like the state."""
    if not d.any():
        seed = derive(5, number, "deal")
        fresh = initial_rows(d.shape[1], rank, seed=seed, site=site).float().double()
        return d.new_zeros(d.shape[0], rank), fresh
    u, sigma, vt = torch.linalg.svd(d, full_matrices=False)
    return u[:, :rank] * sigma[:rank] / SCALE, vt[:rank]


def train(base, ranks, assigned, tail, work):
    """Train one client with peft; `tail` is added to the weights of its copy of the base."""
    module = copy.deepcopy(base)
    for site, extra in tail.items():
        module.get_submodule(site).weight.data += extra
    config = LoraConfig(
        r=1,
        lora_alpha=SCALE,
        rank_pattern=dict(ranks),
        alpha_pattern={site: SCALE * rank for site, rank in ranks.items()},
        target_modules=list(ranks),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(module, config, autocast_adapter_dtype=False).double().train()
    pairs = {}
    for site, (b, a) in assigned.items():
        layer = model.get_submodule(f"base_model.model.{site}")
        pairs[site] = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        pairs[site][0].data.copy_(b)
        pairs[site][1].data.copy_(a)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(
        b.numel() + a.numel() for b, a in assigned.values()
    )
    optimizer = torch.optim.AdamW(trainable, lr=LOCAL.lr, weight_decay=LOCAL.weight_decay)
    for _ in range(LOCAL.steps):
        optimizer.zero_grad()
        losses = []
        for row in work.rows["train"]:
            ids = torch.tensor(row.input_ids)
            logits = model(input_ids=ids[None]).logits[0]
            first = row.loss_from
            losses.append(cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none"))
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trainable, LOCAL.clip)
        optimizer.step()
    return {site: (b.detach(), a.detach()) for site, (b, a) in pairs.items()}


@pytest.mark.parametrize("mode", ["replace", "delta", "tail-in-base"])
def test_a_federation_equals_flexlora_by_hand_round_by_round(mode):
    ours, parts = federated(mode, cohort=4)
    assert len({tuple(ranks.values()) for ranks in parts.ranks.values()}) == 3, "unequal ranks"
    for number, (got, expected) in enumerate(zip(ours, by_hand(mode, parts), strict=True), 1):
        for site, matrix in expected.items():
            assert matrix.norm() > 0.05, "it must have learned something to compare"
            worst = (got[site] - matrix).abs().max().item()
            assert worst < 1e-8, (number, site, worst)  # float64, sums in another order


def test_the_size_of_the_cohort_does_not_matter_over_three_rounds():
    alone, _ = federated("delta", cohort=1)
    for cohort in (2, 4):
        together, _ = federated("delta", cohort=cohort)
        for one, other in zip(alone, together, strict=True):
            for site, matrix in one.items():
                torch.testing.assert_close(other[site], matrix, rtol=0, atol=1e-8)
