"""Passes of several clients' rows through the server's blocks, forward and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyrank.data.collate import IGNORED
from polyrank.model import Cut, LoadedModel, losses_then_gradient
from polyrank.model.routing import Routing
from polyrank.training.split.messages import Activations, Gradients, Returned
from polyrank.training.split.packing import Rows, gradient_of
from polyrank.training.split.trainer import Trainer

Passed = Returned | str
"""What a client is answered, or what of its pass was not finite."""


class Passes:
    """Runs the blocks behind one cut, and has their gradients added to what `trainer` trains.

    Where clients add to one sum, a pass with something that is not finite leaves the sum as it was,
    and those who came together are passed one by one, so that only the culprit fails.
    """

    def __init__(self, model: LoadedModel, cut: Cut, trainer: Trainer):
        self._model, self._cut, self._trainer = model, cut, trainer
        self._kept: dict[tuple[str, int], _Batch] = {}

    def through(self, group: Sequence[Activations]) -> list[Passed]:
        """Run tails with the loss, and back."""
        batch, before = self._begun(group), self._copied()
        labels = torch.cat([one.labels for one in group if one.labels is not None])
        labels = labels.to(self._model.device)
        wanted = labels != IGNORED
        counts = torch.stack([part.sum() for part in wanted.split(batch.counts)]).tolist()
        weights = [self._trainer.share(one.weight) for one in group]
        share = torch.tensor(weights, dtype=self._trainer.cohort.dtype)
        share = share.repeat_interleave(torch.tensor(counts)).to(self._model.device)
        logits = self._cut.tail(batch.hidden, batch.rows.index[wanted])
        losses = losses_then_gradient(logits, labels[wanted], share)
        logits.backward(logits.detach())
        summed = torch.stack([part.sum() for part in losses.split(counts)]).tolist()
        passed = self._returned(batch, group, summed)
        if not self._restored(passed, before) or len(group) == 1:
            return passed
        return [self.through([one])[0] for one in group]

    def forward(self, group: Sequence[Activations]) -> list[Passed]:
        """Run the middles of a U-shape, and keep the graph for the way back."""
        if self._trainer.sums() and len(group) > 1:  # One that diverges would spoil the others'.
            return [self.forward([one])[0] for one in group]
        batch = self._begun(group)
        out = batch.rows.packed(self._cut.middle(batch.hidden)).split(batch.counts)
        batch.waiting = {one.at.client: states for one, states in zip(group, out, strict=True)}
        passed: list[Passed] = []
        for one, states, finite in zip(group, out, _finite(out), strict=True):
            if finite:
                self._kept[one.at.client, one.at.micro] = batch
                passed.append(Returned(one.at, states.detach()))
            else:
                passed.append("what enters the block at the upper cut")
        return passed

    def backward(self, group: Sequence[Gradients]) -> list[Passed]:
        """Run back through the middles, one pass for those that went forward together."""
        found: dict[int, list[Gradients]] = {}
        for one in group:
            found.setdefault(id(self._kept[one.at.client, one.at.micro]), []).append(one)
        passed: dict[str, Passed] = {}
        for together in found.values():
            names = [one.at.client for one in together]
            passed |= zip(names, self._back(together), strict=True)
        return [passed[one.at.client] for one in group]

    def drop(self, client: str) -> None:
        """Forget the passes of a client that wait for their way back."""
        self._kept = {key: batch for key, batch in self._kept.items() if key[0] != client}

    def _begun(self, group: Sequence[Activations]) -> _Batch:
        """Bring the clients' rows into one batch, their states a leaf of autograd."""
        rows = Rows([n for one in group for n in one.lengths], self._model.device)
        packed = torch.cat([one.states.detach() for one in group])
        hidden = rows.padded(packed.to(device=self._model.device, dtype=self._model.dtype))
        return _Batch(
            clients=[one.at.client for one in group],
            weights=[one.weight for one in group],
            counts=[sum(one.lengths) for one in group],
            rows=rows,
            hidden=hidden.requires_grad_(),
            routing=self._trainer.cohort.route(self._trainer.parts(group)),
        )

    def _back(self, group: Sequence[Gradients]) -> list[Passed]:
        batch = self._kept[group[0].at.client, group[0].at.micro]
        before = self._copied()
        self._trainer.cohort.reroute(batch.routing)
        ends, gradients = [], []
        for one in group:
            weight = batch.weights[batch.clients.index(one.at.client)]
            end = batch.waiting.pop(one.at.client)
            ends.append(end)
            gradients.append(one.states.to(end) * (self._trainer.share(weight) / weight))
        torch.autograd.backward(ends, gradients, retain_graph=bool(batch.waiting))
        for one in group:
            del self._kept[one.at.client, one.at.micro]
        passed = self._returned(batch, group, [None] * len(group))
        self._restored(passed, before)
        return passed

    def _returned(
        self,
        batch: _Batch,
        group: Sequence[Activations | Gradients],
        losses: Sequence[float | None],
    ) -> list[Passed]:
        """Return the gradients of the batch's rows to those who asked."""
        by_client = zip(
            batch.clients,
            batch.weights,
            batch.rows.packed(gradient_of(batch.hidden)).split(batch.counts),
            strict=True,
        )
        scaled = {
            client: states * (weight / self._trainer.share(weight))
            for client, weight, states in by_client
        }
        mine = [scaled[one.at.client] for one in group]
        whole = all(_finite(self._trainer.sums()))
        passed: list[Passed] = []
        for one, states, loss, finite in zip(group, mine, losses, _finite(mine), strict=True):
            if whole and finite and math.isfinite(loss or 0.0):
                passed.append(Returned(one.at, states, loss))
            else:
                passed.append(f"loss {loss}, or its gradient,")
        return passed

    def _copied(self) -> list[Tensor]:
        return [one.clone() for one in self._trainer.sums()]

    def _restored(self, passed: Sequence[Passed], before: Sequence[Tensor]) -> bool:
        """Undo a pass in what clients sum together, if something in it was not finite."""
        if not before or all(isinstance(one, Returned) for one in passed):
            return False
        for added, kept in zip(self._trainer.sums(), before, strict=True):
            added.copy_(kept)
        return True


@dataclass(eq=False)
class _Batch:
    """Clients' rows in one batch: names, loss weights and tokens of each; `hidden` goes in.

    `waiting` is what came out and has yet to come back.
    """

    clients: list[str]
    weights: list[float]
    counts: list[int]
    rows: Rows
    hidden: Tensor
    routing: Routing
    waiting: dict[str, Tensor] = field(default_factory=dict)


def _finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return of each whether all of its numbers are, with one wait for the device."""
    if not tensors:
        return []
    return torch.stack([torch.isfinite(one).all() for one in tensors]).tolist()
