"""Microbatches at the clients' end: through the clients' blocks, to the server and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.data.collate import IGNORED
from polyrank.data.types import Encoded
from polyrank.model import Cohort, Cut, LoadedModel, Part, losses_then_gradient
from polyrank.model.routing import Routing
from polyrank.seeds import generator
from polyrank.training.batches import TargetBatch, assemble
from polyrank.training.split.client import SplitClient
from polyrank.training.split.link import PendingReply
from polyrank.training.split.messages import Activations, Gradients, RequestId
from polyrank.training.split.packing import PackedRows, gradient_of
from polyrank.training.split.protect import bounded, noised
from polyrank.training.split.settings import SplitSettings


class Microbatches:
    """Runs microbatches of clients of one cut; the gradients of their own factors add up."""

    def __init__(self, model: LoadedModel, cut: Cut, cohort: Cohort, settings: SplitSettings):
        self._model, self._cut, self._cohort, self._settings = model, cut, cohort, settings

    def send(
        self, step: int, micro: int, groups: Mapping[SplitClient, list[list[Encoded]]]
    ) -> InFlightBatch | None:
        """Run the first blocks and send their activations; None if no client is working."""
        clients = [client for client in groups if client.working]
        if not clients:
            return None
        rows_of = [groups[client][micro] for client in clients]
        lengths = [tuple(len(row.input_ids) for row in rows) for rows in rows_of]
        routing = self._cohort.route(
            [
                Part(client.slot, len(own), max(own), (step, micro), client.progress.scored(step))
                for client, own in zip(clients, lengths, strict=True)
            ]
        )
        all_rows = [row for rows in rows_of for row in rows]
        batch = assemble(all_rows, self._model.tokenizer.pad_token_id, self._model.device)
        packing = PackedRows([n for own in lengths for n in own], self._model.device)
        counts = [sum(own) for own in lengths]
        hidden = packing.packed(self._cut.head(batch.input_ids)).split(counts)
        self._cohort.rest()
        labels = _labels(batch, packing).split(counts)
        requests = []
        for i, client in enumerate(clients):
            id, last = client.request_id(step, micro), micro + 1 == len(groups[client])
            out = self._protected(hidden[i], client, step, micro)
            sent_labels = labels[i] if self._cut.upper is None else None
            weight = client.progress.weight
            message = Activations(id, last, weight, lengths[i], out.detach(), sent_labels)
            targets = sum(row.targets for row in rows_of[i])
            requests.append(PendingRequest(client, id, last, out, targets, client.send(message)))
        return InFlightBatch(requests, routing, packing, batch)

    def receive(self, micro: InFlightBatch) -> None:
        """Wait for the replies to a microbatch, and run the first blocks back."""
        if self._cut.upper is not None:
            self._run_last_blocks(micro)
        ends, gradients = [], []
        for request in micro.requests:
            back = request.receive()
            if back is not None and request.out.requires_grad:
                ends.append(request.out)
                gradients.append(back.to(request.out))
        if ends:
            self._cohort.reroute(micro.routing)
            torch.autograd.backward(ends, gradients)
            self._cohort.rest()

    def _protected(self, states: Tensor, client: SplitClient, step: int, micro: int) -> Tensor:
        """Return the activations as they may leave the client: bounded, with noise."""
        bound = bounded(states, self._settings.clip)
        if not self._settings.noise:
            return bound
        source = generator(client.job.seed, "noise", step, micro)
        return noised(bound, self._settings.noise, source)

    def _run_last_blocks(self, micro: InFlightBatch) -> None:
        """U-shape: run the last blocks with the loss, and send the gradients to the server.

        A client that has given up stays in the batch, with zeros; its results are not used.
        """
        requests = micro.requests
        returned = [request.receive() for request in requests]
        if all(states is None for states in returned):
            return
        packed = torch.cat(
            [
                torch.zeros_like(request.out)
                if states is None
                else states.to(device=self._model.device, dtype=self._model.dtype)
                for request, states in zip(requests, returned, strict=True)
            ]
        )
        hidden = micro.packing.padded(packed.detach()).requires_grad_()
        targets = [request.targets for request in requests]
        weights = torch.tensor(
            [request.client.progress.weight for request in requests], dtype=self._cohort.dtype
        )
        share = weights.repeat_interleave(torch.tensor(targets)).to(self._model.device)
        self._cohort.reroute(micro.routing)
        logits = self._cut.tail(hidden, micro.batch.positions)
        losses = losses_then_gradient(logits, micro.batch.targets, share)
        logits.backward(logits.detach())
        self._cohort.rest()
        summed = torch.stack([part.sum() for part in losses.split(targets)]).tolist()
        counts = [len(request.out) for request in requests]
        back = micro.packing.packed(gradient_of(hidden)).split(counts)
        for request, loss, states in zip(requests, summed, back, strict=True):
            client = request.client
            if client.working:
                client.add_loss(loss)
                request.pending = client.send(Gradients(request.id, request.last, states))


@dataclass(eq=False)
class PendingRequest:
    """One client's share of a microbatch in flight: the states `out` (P×d) and the reply to them.

    `targets` are the tokens with a loss among its P.
    """

    client: SplitClient
    id: RequestId
    last: bool
    out: Tensor
    targets: int
    pending: PendingReply | None

    def receive(self) -> Tensor | None:
        """Wait for the states that come back; None if the client has given up."""
        return self.client.receive(self.pending, self.id, self.out.shape)


@dataclass(eq=False)
class InFlightBatch:
    """A microbatch that waits for its replies, with what the backward pass needs then."""

    requests: Sequence[PendingRequest]
    routing: Routing
    packing: PackedRows
    batch: TargetBatch


def _labels(batch: TargetBatch, packing: PackedRows) -> Tensor:
    """Return per token of the packed rows the token that follows, or `IGNORED`."""
    whole = torch.full((batch.input_ids.numel(),), IGNORED, device=batch.targets.device)
    whole[batch.positions] = batch.targets
    return whole[packing.index]
