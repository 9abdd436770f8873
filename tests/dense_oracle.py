"""Local training as its definition says, with whole matrices and autograd alone: a slow oracle.

    adapter, loss = train_densely(model, one)      # one: a Job, of any kind

Nothing of polyrank's cohorts, hooks or analytic gradients is used: the model is called with
W + M + F + s·BA (or + S or + D) in the place of each W, the penalty and FedProx's term are part of
the loss, and torch's own clipping and optimizers do the rest. No dropout.
"""

import dataclasses

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models import PAD
from polyrank.aggregation.types import TRAINED, Penalty
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.model import LoadedModel
from polyrank.training import Job
from polyrank.training.batches import step_groups


def train_densely(model: LoadedModel, one: Job) -> tuple[Adapter, float]:
    """Return what the job's training must give, s folded into B, and the mean loss per token."""
    local, start, scale = one.local, one.assignment.start, one.assignment.scale
    leaves: dict[str, dict[str, Tensor]] = {}
    trained: list[Tensor] = []
    for site, delta in start.items():
        if isinstance(delta, Sparse):
            leaves[site] = {"values": delta.values.clone().requires_grad_()}
        elif isinstance(delta, Dense):
            leaves[site] = {"matrix": delta.matrix.clone().requires_grad_()}
        else:
            moves = TRAINED[one.assignment.train]
            leaves[site] = {
                "a": delta.a.clone().requires_grad_("a" in moves),
                "b": (delta.b / scale[site]).requires_grad_("b" in moves),
            }
        trained += [leaf for leaf in leaves[site].values() if leaf.requires_grad]
    begun = [leaf.detach().clone() for leaf in trained]
    if local.resolved.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            trained, local.lr, local.betas, local.eps, weight_decay=local.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            trained, local.lr, local.momentum, weight_decay=local.weight_decay
        )
    steps = local.steps_for(len(one.examples))
    summed, seen = 0.0, 0
    for step, group in enumerate(step_groups(len(one.examples), local, one.seed)):
        if step == steps:
            break
        optimizer.zero_grad()
        rows = [[one.examples[i] for i in micro] for micro in group]
        targets = sum(row.targets for micro in rows for row in micro)
        for micro in rows:
            loss = _loss(model, one, leaves, micro)
            (loss / targets).backward()
            summed += loss.item()
        seen += targets
        (
            _penalty(one.assignment.penalty, leaves)
            + _proximal(local.resolved.proximal, trained, begun)
        ).backward()
        if local.clip:
            nn.utils.clip_grad_norm_(trained, local.clip)
        for settings in optimizer.param_groups:
            settings["lr"] = local.rate(step, steps)
        optimizer.step()
    found = {}
    for site, delta in start.items():
        ended = {name: leaf.detach() for name, leaf in leaves[site].items()}
        if isinstance(delta, Sparse):
            found[site] = Sparse(ended["values"], delta.positions, delta.shape)
        elif isinstance(delta, Dense):
            found[site] = Dense(ended["matrix"])
        else:
            found[site] = LowRank(ended["b"] * scale[site], ended["a"])
    return Adapter(found), summed / seen


def _loss(model: LoadedModel, one: Job, leaves, rows) -> Tensor:
    changed = {}
    for site, delta in one.assignment.start.items():
        child = model.module.get_submodule(site)
        update = _update(delta, leaves[site], one.assignment.scale[site])
        for active in (one.assignment.frozen, one.assignment.merged):
            if site in active:
                update = update + active[site].dense()
        changed[f"{site}.weight"] = child.weight + (
            update.T if isinstance(child, Conv1D) else update
        )
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, row.loss_from : len(row.input_ids)] = torch.tensor(row.input_ids[row.loss_from :])
    logits = torch.func.functional_call(model.module, changed, (ids,)).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def _update(delta, own: dict[str, Tensor], scale: float) -> Tensor:
    if isinstance(delta, Dense):
        return own["matrix"]
    if not isinstance(delta, Sparse):
        return scale * (own["b"] @ own["a"])
    m, n = delta.shape
    whole = own["values"].new_zeros(m * n)
    return whole.index_put((delta.positions,), own["values"]).view(m, n)


def _penalty(penalty: Penalty | None, leaves) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for site, keep in (penalty.keep if penalty else {}).items():
        a, b = leaves[site]["a"], leaves[site]["b"]
        total = total + penalty.strength * b[:, keep:].norm() * a[keep:].norm()
    return total


def _proximal(strength: float, trained: list[Tensor], begun: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for leaf, first in zip(trained, begun, strict=True):
        total = total + strength / 2 * (leaf - first).square().sum()
    return total


def difference(one: Adapter, other: Adapter) -> float:
    """Return the largest difference between trained tensors of two adapters of one kind."""
    assert {s: type(d) for s, d in one.items()} == {s: type(d) for s, d in other.items()}
    pairs = [
        (x, y)
        for site in one
        for x, y in zip(one[site].tensors().values(), other[site].tensors().values(), strict=True)
    ]
    return max((x - y).abs().max().item() for x, y in pairs if x.numel())


def random_merged(
    model: LoadedModel, *, seed: int = 50, size: float = 0.5, every: int = 1
) -> Adapter:
    """Return dense sums at every so many sites, with entries of about size/√n."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            site: Dense(
                torch.randn(m, n, generator=generator, dtype=torch.float64).to(
                    torch.promote_types(model.dtype, torch.float32)
                )
                * size
                / n**0.5
            )
            for site, (m, n) in list(model.spec.shapes.items())[::every]
        }
    )


def random_sparse(model: LoadedModel, count: int, *, seed: int = 0, without: int = 0) -> Adapter:
    """Return sparse updates of `count` values a site; rank 0 at the first `without` sites."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, LowRank | Sparse] = {}
    for i, (site, (m, n)) in enumerate(model.spec.shapes.items()):
        positions = torch.randperm(m * n, generator=generator)[:count].sort().values
        values = torch.randn(count, generator=generator, dtype=torch.float64) / 4
        dtype = torch.promote_types(model.dtype, torch.float32)
        found[site] = (
            LowRank.zero(m, n, dtype=dtype)
            if i < without
            else Sparse(values.to(dtype), positions, (m, n))
        )
    return Adapter(found)


def random_dense(model: LoadedModel, *, seed: int = 0, without: int = 0) -> Adapter:
    """Return dense updates, and rank 0 at the first `without` sites."""
    whole = random_merged(model, seed=seed)
    return Adapter(
        {
            site: LowRank.zero(*delta.shape, dtype=delta.matrix.dtype) if i < without else delta
            for i, (site, delta) in enumerate(whole.items())
        }
    )


def assigned(one: Job, **changes) -> Job:
    """Return the job with parts of its assignment replaced."""
    return dataclasses.replace(one, assignment=dataclasses.replace(one.assignment, **changes))
