"""A cohort: LoRA layers that hold the adapters of many clients over one frozen base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.algebra import Adapter, LowRank
from polyrank.errors import RankError, SiteError
from polyrank.model.layer import CohortLayer
from polyrank.model.load import LoadedModel
from polyrank.model.routing import Part, Routing

__all__ = ["Cohort", "Part", "Slot", "applied"]


@dataclass(frozen=True)
class Slot:
    """One client's place in a cohort: what it trains and how its inputs are dropped out.

    `start` has every scale s folded into B, `scale` gives s per site, `frozen` is active and not
    trained. `dropout` is the probability of LoRA's input dropout and `seed` the seed of its masks.
    """

    start: Adapter
    scale: Mapping[str, float]
    frozen: Adapter = field(default_factory=lambda: Adapter({}))
    dropout: float = 0.0
    seed: int = 0


class Cohort:
    """K adapters over one base, attached while the context is entered.

    At every site y = W x + s_k B_k A_k dropout_k(x) + F_k x for the rows of slot k, with A_k r×n,
    B_k m×r and F_k the frozen term. All slots' factors of a site lie in two stacks, K×r×n and
    K×r×m (B transposed), with shorter ranks padded by zeros on both factors: the gradients of the
    padding are exactly zero. Factors are float32, or float64 on a float64 base; a base in bfloat16
    gets its inputs raised to float32 and the sum rounded back, as in peft.

    Before each forward pass of a cohort, `route` says whose rows the batch holds. A cohort of one
    needs no routing to evaluate or generate: it then takes inputs of any shape, without dropout.
    The routing stays until the next, so that a backward pass that computes activations again sees
    the same one. The base itself is never written; on leaving the context, also by an error, the
    model is as it was.

    Raises SiteError if a slot's sites are not exactly the model's or a shape differs, and RankError
    if a rank is above what its matrix allows.
    """

    def __init__(self, model: LoadedModel, slots: Sequence[Slot]):
        if not slots:
            raise SiteError("Cohort: expected at least one slot, got none")
        self.model = model
        self.slots = tuple(slots)
        shapes = model.spec.shapes
        for k, slot in enumerate(self.slots):
            _check(f"slot {k} of {len(self.slots)}", slot, shapes)
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        ranks = {s: max(slot.start[s].rank for slot in self.slots) for s in sorted(shapes)}
        self._split = sum(ranks[site] * shapes[site][1] for site in ranks)
        size = self._split + sum(ranks[site] * shapes[site][0] for site in ranks)
        self._values = torch.zeros(len(self.slots), size, dtype=self.dtype, device=model.device)
        self._gradients = torch.zeros_like(self._values)
        self._layers: dict[str, CohortLayer] = {}
        a_from, b_from = 0, self._split
        for site, rank in ranks.items():
            m, n = shapes[site]
            layer = CohortLayer(
                site,
                self._leaf(a_from, rank, n),
                self._leaf(b_from, rank, m),
                [slot.scale[site] for slot in self.slots],
                [slot.frozen.get(site) for slot in self.slots],
                [(slot.dropout, slot.seed) for slot in self.slots],
            )
            self._layers[site] = layer
            a_from, b_from = a_from + rank * n, b_from + rank * m
            for k, slot in enumerate(self.slots):
                layer.load(k, slot.start[site])
        self._hooks = ExitStack()

    def _leaf(self, start: int, rank: int, width: int) -> Tensor:
        """Return a K×rank×width leaf over the flat storage; what it gains goes to `_gradients`."""
        view = (len(self.slots), rank, width)
        columns = slice(start, start + rank * width)
        leaf = self._values[:, columns].view(view).detach().requires_grad_()
        gradient = self._gradients[:, columns].view(view)

        def collect(leaf: Tensor) -> None:
            if leaf.grad is not None:
                gradient.add_(leaf.grad)
                leaf.grad = None

        leaf.register_post_accumulate_grad_hook(collect)
        return leaf

    def __enter__(self) -> Cohort:
        with ExitStack() as hooks:
            for site, layer in self._layers.items():
                if layer.rank or layer.has_frozen:
                    module = self.model.module.get_submodule(site)
                    hooks.callback(module.register_forward_hook(layer.hook).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()

    def route(self, parts: Sequence[Part]) -> None:
        """Say whose rows the next batches hold: the parts' rows follow each other in this order.

        Raises SiteError if a part names no slot of this cohort, or one slot twice, or has no row.
        """
        routing = Routing(parts, len(self.slots), self.model.device)
        for layer in self._layers.values():
            layer.routing = routing

    def parameters(self, k: int) -> list[nn.Parameter]:
        """Return slot k's parameters: all its A, and all its B, each as one flat vector.

        They are views of what the layers compute with, and so are their gradients: an optimizer
        made of them trains slot k and no other. The padding of shorter ranks lies among them as
        zeros with zero gradients, which change no norm and which no optimizer moves.
        """
        found = []
        for columns in (slice(0, self._split), slice(self._split, None)):
            parameter = nn.Parameter(self._values[k, columns])
            parameter.grad = self._gradients[k, columns]
            found.append(parameter)
        return found

    def zero_gradients(self) -> None:
        """Set the gradients of all slots to zero, in place."""
        self._gradients.zero_()

    def adapter(self, k: int) -> Adapter:
        """Return a copy of slot k's factors at their true ranks, with s folded into B again."""
        start = self.slots[k].start
        return Adapter({s: layer.read(k, start[s].rank) for s, layer in self._layers.items()})


def applied(model: LoadedModel, adapter: Adapter | None) -> Cohort:
    """Return the context in which the adapter acts without being trained; None: the bare base.

    It may lack sites and have any rank, also one above its matrices', as a sum of adapters may.
    """
    zero = {
        site: LowRank.zero(*shape, device=model.device) for site, shape in model.spec.shapes.items()
    }
    frozen = Adapter({}) if adapter is None else adapter
    return Cohort(model, [Slot(Adapter(zero), dict.fromkeys(zero, 1.0), frozen)])


def _check(place: str, slot: Slot, shapes: Mapping[str, tuple[int, int]]) -> None:
    named: list[tuple[str, Mapping[str, Any]]] = [("start", slot.start), ("scale", slot.scale)]
    for what, mapping in named:
        missing = sorted(set(shapes) - set(mapping))
        extra = sorted(set(mapping) - set(shapes))
        if missing or extra:
            raise SiteError(
                f"Cohort, {place}: {what} must cover exactly the model's {len(shapes)} sites; "
                f"missing {missing[:5]}, not in the model {extra[:5]}. Use LowRank.zero for a site "
                "without an update, and load the model with the sites of the adapter"
            )
    unknown = sorted(set(slot.frozen) - set(shapes))
    if unknown:
        raise SiteError(f"Cohort, {place}: frozen terms at {unknown[:5]}, not sites of the model")
    for what, adapter in (("start", slot.start), ("frozen", slot.frozen)):
        for site, delta in adapter.items():
            if delta.shape != shapes[site]:
                raise SiteError(
                    f"Cohort, {place}: {what} at {site} is {delta.shape}, the matrix there is "
                    f"{shapes[site]} (out × in)"
                )
    for site, delta in slot.start.items():
        _check_rank(f"{place}, {site}", delta)
    for site, scale in slot.scale.items():
        if not (math.isfinite(scale) and scale != 0.0):
            raise SiteError(
                f"Cohort, {place}: the scale at {site} must be finite and not 0, got {scale}"
            )
    if not 0.0 <= slot.dropout < 1.0:
        raise SiteError(f"Cohort, {place}: dropout must be in [0, 1), got {slot.dropout}")


def _check_rank(place: str, delta: LowRank) -> None:
    if delta.rank > min(delta.shape):
        raise RankError(
            f"Cohort, {place}: rank {delta.rank} is above what a matrix of {delta.shape} allows"
        )
