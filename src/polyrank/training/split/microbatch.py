"""A microbatch of the clients' end: through the heads, to the server and back."""

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
from polyrank.training.split.link import Pending
from polyrank.training.split.member import SplitClient
from polyrank.training.split.messages import Activations, At, Gradients
from polyrank.training.split.packing import Rows, gradient_of
from polyrank.training.split.protect import bounded, noised
from polyrank.training.split.settings import SplitSettings


class Microbatches:
    """Runs microbatches of clients of one cut; their heads' gradients add up in the cohort."""

    def __init__(self, model: LoadedModel, cut: Cut, cohort: Cohort, settings: SplitSettings):
        self._model, self._cut, self._cohort, self._settings = model, cut, cohort, settings

    def send(
        self, step: int, micro: int, groups: Mapping[SplitClient, list[list[Encoded]]]
    ) -> InFlightBatch | None:
        """Run the heads and send what comes out; None if nobody is there to send."""
        members = [one for one in groups if one.working]
        if not members:
            return None
        taken = [groups[one][micro] for one in members]
        lengths = [tuple(len(row.input_ids) for row in rows) for rows in taken]
        routing = self._cohort.route(
            [
                Part(one.slot, len(each), max(each), (step, micro), one.course.scored(step))
                for one, each in zip(members, lengths, strict=True)
            ]
        )
        rows = [row for each in taken for row in each]
        batch = assemble(rows, self._model.tokenizer.pad_token_id, self._model.device)
        packing = Rows([n for each in lengths for n in each], self._model.device)
        counts = [sum(each) for each in lengths]
        hidden = packing.packed(self._cut.head(batch.input_ids)).split(counts)
        self._cohort.rest()
        labels = _labels(batch, packing).split(counts)
        legs = []
        for i, one in enumerate(members):
            at, last = one.at(step, micro), micro + 1 == len(groups[one])
            out = self._protected(hidden[i], one, step, micro)
            own = labels[i] if self._cut.upper is None else None
            message = Activations(at, last, one.course.weight, lengths[i], out.detach(), own)
            targets = sum(row.targets for row in taken[i])
            legs.append(PendingRequest(one, at, last, out, targets, one.send(message)))
        return InFlightBatch(legs, routing, packing, batch)

    def receive(self, micro: InFlightBatch) -> None:
        """Take the answers to a microbatch, and run the heads back."""
        if self._cut.upper is not None:
            self._through_the_end(micro)
        ends, gradients = [], []
        for leg in micro.legs:
            back = leg.answer()
            if back is not None and leg.out.requires_grad:
                ends.append(leg.out)
                gradients.append(back.to(leg.out))
        if ends:
            self._cohort.reroute(micro.routing)
            torch.autograd.backward(ends, gradients)
            self._cohort.rest()

    def _protected(self, states: Tensor, one: SplitClient, step: int, micro: int) -> Tensor:
        """Return what may leave the client."""
        sent = bounded(states, self._settings.clip)
        if not self._settings.noise:
            return sent
        source = generator(one.job.seed, "noise", step, micro)
        return noised(sent, self._settings.noise, source)

    def _through_the_end(self, micro: InFlightBatch) -> None:
        """U-shape: run the last blocks with the loss, and send the gradients to the server.

        Who has failed stays in the batch, with zeros; what comes of them is not used.
        """
        answers = [leg.answer() for leg in micro.legs]
        if all(states is None for states in answers):
            return
        packed = torch.cat(
            [
                torch.zeros_like(leg.out)
                if states is None
                else states.to(device=self._model.device, dtype=self._model.dtype)
                for leg, states in zip(micro.legs, answers, strict=True)
            ]
        )
        hidden = micro.packing.padded(packed.detach()).requires_grad_()
        targets = [leg.targets for leg in micro.legs]
        weights = torch.tensor(
            [leg.member.course.weight for leg in micro.legs], dtype=self._cohort.dtype
        )
        share = weights.repeat_interleave(torch.tensor(targets)).to(self._model.device)
        self._cohort.reroute(micro.routing)
        logits = self._cut.tail(hidden, micro.batch.positions)
        losses = losses_then_gradient(logits, micro.batch.targets, share)
        logits.backward(logits.detach())
        self._cohort.rest()
        summed = torch.stack([part.sum() for part in losses.split(targets)]).tolist()
        counts = [len(leg.out) for leg in micro.legs]
        back = micro.packing.packed(gradient_of(hidden)).split(counts)
        for leg, loss, states in zip(micro.legs, summed, back, strict=True):
            if leg.member.working:
                leg.member.add_loss(loss)
                leg.pending = leg.member.send(Gradients(leg.at, leg.last, states))


@dataclass(eq=False)
class PendingRequest:
    """One client's share of a microbatch under way: what went `out`, P×d, and the answer to it.

    `targets` are the tokens with a loss among its P.
    """

    member: SplitClient
    at: At
    last: bool
    out: Tensor
    targets: int
    pending: Pending | None

    def answer(self) -> Tensor | None:
        """Wait for the states that come back; None if the client has given up."""
        return self.member.take(self.pending, self.at, self.out.shape)


@dataclass(eq=False)
class InFlightBatch:
    """A microbatch that waits for its answers, and what autograd will need then."""

    legs: Sequence[PendingRequest]
    routing: Routing
    packing: Rows
    batch: TargetBatch


def _labels(batch: TargetBatch, packing: Rows) -> Tensor:
    """Return per token of the packed rows the token that follows, or `IGNORED`."""
    whole = torch.full((batch.input_ids.numel(),), IGNORED, device=batch.targets.device)
    whole[batch.positions] = batch.targets
    return whole[packing.index]
