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
from polyrank.training.split.packing import PackedRows, gradient_of
from polyrank.training.split.trainer import AdapterTrainer

PassResult = Returned | str
"""The reply to a client, or what was not finite in its pass."""


class Passes:
    """Runs the blocks behind one cut; their gradients are added to the factors of `trainer`.

    Where clients add to one sum, a pass with a number that is not finite leaves the sum as it was,
    and the clients of that pass are run again one by one, so that only the culprit fails.
    """

    def __init__(self, model: LoadedModel, cut: Cut, trainer: AdapterTrainer):
        self._model, self._cut, self._trainer = model, cut, trainer
        self._in_flight: dict[tuple[str, int], _Batch] = {}

    def through(self, group: Sequence[Activations]) -> list[PassResult]:
        """Run the last blocks with the loss, forward and back."""
        batch, before = self._batch_of(group), self._copy_sums()
        labels = torch.cat([request.labels for request in group if request.labels is not None])
        labels = labels.to(self._model.device)
        wanted = labels != IGNORED
        counts = torch.stack([part.sum() for part in wanted.split(batch.counts)]).tolist()
        weights = [self._trainer.share(request.weight) for request in group]
        share = torch.tensor(weights, dtype=self._trainer.cohort.dtype)
        share = share.repeat_interleave(torch.tensor(counts)).to(self._model.device)
        logits = self._cut.tail(batch.hidden, batch.rows.index[wanted])
        losses = losses_then_gradient(logits, labels[wanted], share)
        logits.backward(logits.detach())
        summed = torch.stack([part.sum() for part in losses.split(counts)]).tolist()
        results = self._replies(batch, group, summed)
        if not self._restore_sums(results, before) or len(group) == 1:
            return results
        return [self.through([request])[0] for request in group]

    def forward(self, group: Sequence[Activations]) -> list[PassResult]:
        """U-shape: run the middle blocks forward, and keep the graph for the way back."""
        if (
            self._trainer.sums() and len(group) > 1
        ):  # A client that diverges would spoil the others.
            return [self.forward([request])[0] for request in group]
        batch = self._batch_of(group)
        out = batch.rows.packed(self._cut.middle(batch.hidden)).split(batch.counts)
        batch.waiting = {
            request.id.client: states for request, states in zip(group, out, strict=True)
        }
        results: list[PassResult] = []
        for request, states, finite in zip(group, out, _finite(out), strict=True):
            if finite:
                self._in_flight[request.id.client, request.id.micro] = batch
                results.append(Returned(request.id, states.detach()))
            else:
                results.append("what enters the block at the upper cut")
        return results

    def backward(self, group: Sequence[Gradients]) -> list[PassResult]:
        """U-shape: run the middle blocks back, in the groups that went forward together."""
        by_batch: dict[int, list[Gradients]] = {}
        for request in group:
            by_batch.setdefault(
                id(self._in_flight[request.id.client, request.id.micro]), []
            ).append(request)
        results: dict[str, PassResult] = {}
        for together in by_batch.values():
            names = [request.id.client for request in together]
            results |= zip(names, self._back(together), strict=True)
        return [results[request.id.client] for request in group]

    def drop(self, client: str) -> None:
        """Drop a client's passes that have not gone back."""
        self._in_flight = {key: batch for key, batch in self._in_flight.items() if key[0] != client}

    def _batch_of(self, group: Sequence[Activations]) -> _Batch:
        """Return the clients' rows as one batch, their states a leaf of autograd."""
        rows = PackedRows([n for request in group for n in request.lengths], self._model.device)
        packed = torch.cat([request.states.detach() for request in group])
        hidden = rows.padded(packed.to(device=self._model.device, dtype=self._model.dtype))
        return _Batch(
            clients=[request.id.client for request in group],
            weights=[request.weight for request in group],
            counts=[sum(request.lengths) for request in group],
            rows=rows,
            hidden=hidden.requires_grad_(),
            routing=self._trainer.cohort.route(self._trainer.parts(group)),
        )

    def _back(self, group: Sequence[Gradients]) -> list[PassResult]:
        batch = self._in_flight[group[0].id.client, group[0].id.micro]
        before = self._copy_sums()
        self._trainer.cohort.reroute(batch.routing)
        ends, gradients = [], []
        for request in group:
            weight = batch.weights[batch.clients.index(request.id.client)]
            end = batch.waiting.pop(request.id.client)
            ends.append(end)
            gradients.append(request.states.to(end) * (self._trainer.share(weight) / weight))
        torch.autograd.backward(ends, gradients, retain_graph=bool(batch.waiting))
        for request in group:
            del self._in_flight[request.id.client, request.id.micro]
        results = self._replies(batch, group, [None] * len(group))
        self._restore_sums(results, before)
        return results

    def _replies(
        self,
        batch: _Batch,
        group: Sequence[Activations | Gradients],
        losses: Sequence[float | None],
    ) -> list[PassResult]:
        """Return each client of the group the gradient of its rows in the batch."""
        rows_of = zip(
            batch.clients,
            batch.weights,
            batch.rows.packed(gradient_of(batch.hidden)).split(batch.counts),
            strict=True,
        )
        scaled = {
            client: states * (weight / self._trainer.share(weight))
            for client, weight, states in rows_of
        }
        own = [scaled[request.id.client] for request in group]
        whole = all(_finite(self._trainer.sums()))
        results: list[PassResult] = []
        for request, states, loss, finite in zip(group, own, losses, _finite(own), strict=True):
            if whole and finite and math.isfinite(loss or 0.0):
                results.append(Returned(request.id, states, loss))
            else:
                results.append(f"loss {loss}, or its gradient,")
        return results

    def _copy_sums(self) -> list[Tensor]:
        return [total.clone() for total in self._trainer.sums()]

    def _restore_sums(self, results: Sequence[PassResult], before: Sequence[Tensor]) -> bool:
        """Restore the shared sums if something in the pass was not finite; return whether so."""
        if not before or all(isinstance(result, Returned) for result in results):
            return False
        for total, copied in zip(self._trainer.sums(), before, strict=True):
            total.copy_(copied)
        return True


@dataclass(eq=False)
class _Batch:
    """Clients' rows in one batch, with the name, loss weight and token count of each client.

    `hidden` is the input; `waiting` the outputs, by client, whose gradients have not come back.
    """

    clients: list[str]
    weights: list[float]
    counts: list[int]
    rows: PackedRows
    hidden: Tensor
    routing: Routing
    waiting: dict[str, Tensor] = field(default_factory=dict)


def _finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return of each tensor whether all of its numbers are finite; waits once for the device."""
    if not tensors:
        return []
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).tolist()
