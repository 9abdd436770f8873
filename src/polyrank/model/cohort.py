"""A cohort: layers that hold the adapters of many clients over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from polyrank.aggregation.types import TRAINED, fixed
from polyrank.algebra import Adapter, Delta, Dense, LowRank, from_tensors
from polyrank.errors import SiteError
from polyrank.model.factors import Factors
from polyrank.model.importance import Meter, check_metric
from polyrank.model.layer import CohortLayer, Trained
from polyrank.model.load import LoadedModel
from polyrank.model.routing import Part, Routing, Share
from polyrank.model.slot import Slot, check_delta, check_slots
from polyrank.model.storage import SlotStorage
from polyrank.model.swap import with_sums
from polyrank.model.values import Values
from polyrank.model.whole import Whole

__all__ = ["Cohort", "Part", "Share", "Slot", "applied"]


class Cohort:
    """K adapters over one base, attached while the context is entered.

    At every site y = (W + M) x + s_k B_k A_k dropout_k(x) + F_k x for the rows of slot k, with A_k
    r×n, B_k m×r, F_k the frozen term and M what `merged` has there, the same for all slots. All
    slots' factors of a site lie in two stacks, K×r×n and K×r×m (B transposed), with shorter ranks
    padded by zeros on both factors: the gradients of the padding are exactly zero. Slots with
    sparse starts add S_k x instead, S_k with values at few positions, and slots with dense starts
    D_k x, D_k trained at every entry. A cohort is of one kind.

    Factors are float32, or float64 on a float64 base; a base in bfloat16 gets its inputs raised to
    float32 and the sum rounded back, as in peft. M is added to W in that precision too. On a base
    that is stored in it the modules hold W + M for the time, which costs that much memory and no
    time; on another the product M x is added in each pass, for W + M would be rounded.

    Before each forward pass of a cohort, `route` says whose rows the batch holds. A cohort of one
    needs no routing to evaluate or generate: it then takes inputs of any shape, without dropout.
    The routing stays until the next, so that a backward pass that computes activations again sees
    the same one. The base itself is never written; on leaving the context, also by an error, the
    model is as it was.

    With `scored` it can measure how important W is at each site: in passes whose parts ask for it,
    all sites are scored, also those where nothing is trained and those below the lowest that is,
    for which the embedded tokens are made to require a gradient. `scores` has what came of it since
    `zero_gradients`. Scoring changes no gradient of what is trained.

    Raises SiteError if a slot's sites are not exactly the model's, a shape differs or kinds of
    starts are mixed, and RankError if a rank is above what its matrix allows.
    """

    def __init__(
        self,
        model: LoadedModel,
        slots: Sequence[Slot],
        merged: Adapter[Dense] | None = None,
        *,
        scored: bool = False,
    ):
        self.model, self.slots = model, tuple(slots)
        shapes = model.spec.shapes
        check_slots(self.slots, shapes)
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._swapped, added = self._placed(Adapter({}) if merged is None else merged)
        trained = self._trained()
        like = torch.empty(0, dtype=self.dtype, device=model.device)
        self._meter: Meter | None = None
        if scored:
            modules = {site: model.module.get_submodule(site) for site in sorted(shapes)}
            heights = {site: shapes[site][0] for site in modules}
            self._meter = Meter(len(self.slots), modules, heights, like)
        self._scoring = False
        self._layers: dict[str, CohortLayer] = {}
        for site, term in trained.items():
            frozen = [slot.frozen.get(site) for slot in self.slots]
            layer = CohortLayer(
                site, term, frozen, added.get(site), like, shapes[site], self._meter
            )
            self._layers[site] = layer
            for k, slot in enumerate(self.slots):
                term.load(k, slot.start[site])
        self._penalties = self._penalised()
        self._attached = ExitStack()

    def _placed(self, merged: Adapter[Dense]) -> tuple[Adapter[Dense], dict[str, Tensor]]:
        """Return what of `merged` goes into weights, and the matrices that hooks must add."""
        swapped: dict[str, Dense] = {}
        added: dict[str, Tensor] = {}
        for site, delta in merged.items():
            check_delta("Cohort: merged", site, delta, self.model.spec.shapes)
            if self.model.module.get_submodule(site).weight.dtype == self.dtype:
                swapped[site] = delta
            else:
                added[site] = delta.matrix.to(dtype=self.dtype, device=self.model.device)
        return Adapter(swapped), added

    def _trained(self) -> dict[str, Trained]:
        """Return what is trained per site, of the one kind that the slots have."""
        if any(slot.is_sparse for slot in self.slots):
            return self._sparse()
        if any(slot.is_dense for slot in self.slots):
            return self._whole()
        return self._lowrank()

    def _lowrank(self) -> dict[str, Trained]:
        """Lay the factors of all slots into one row of numbers each: all A, then all B."""
        shapes = self.model.spec.shapes
        ranks = {s: max(slot.start[s].rank for slot in self.slots) for s in sorted(shapes)}
        split = sum(rank * shapes[site][1] for site, rank in ranks.items())
        size = split + sum(rank * shapes[site][0] for site, rank in ranks.items())
        self._storage = SlotStorage(len(self.slots), size, self.dtype, self.model.device)
        self._columns = {"a": slice(0, split), "b": slice(split, None)}
        trained = {name for slot in self.slots for name in TRAINED[slot.train]}
        by_site: dict[str, Trained] = {}
        a_from, b_from = 0, split
        for site, rank in ranks.items():
            m, n = shapes[site]
            by_site[site] = Factors(
                site,
                self._storage.leaf(a_from, rank, n, trained="a" in trained),
                self._storage.leaf(b_from, rank, m, trained="b" in trained),
                (
                    self._storage.gradient(a_from, rank, n),
                    self._storage.gradient(b_from, rank, m),
                ),
                [slot.scale[site] for slot in self.slots],
                [(slot.dropout, slot.seed) for slot in self.slots],
            )
            a_from, b_from = a_from + rank * n, b_from + rank * m
        return by_site

    def _sparse(self) -> dict[str, Trained]:
        """Lay the values of all slots into one row of numbers each."""
        counts = {
            site: max(_values(slot.start[site]) for slot in self.slots)
            for site in sorted(self.model.spec.shapes)
        }
        total = sum(counts.values())
        self._storage = SlotStorage(len(self.slots), total, self.dtype, self.model.device)
        self._columns = {"values": slice(0, None)}
        by_site: dict[str, Trained] = {}
        first = 0
        for site, count in counts.items():
            starts = [slot.start[site] for slot in self.slots]
            by_site[site] = Values(self._storage.leaf(first, count), starts)
            first += count
        return by_site

    def _whole(self) -> dict[str, Trained]:
        """Lay the matrices of all slots into one row of numbers each."""
        shapes = self.model.spec.shapes
        present = [
            site
            for site in sorted(shapes)
            if any(isinstance(slot.start[site], Dense) for slot in self.slots)
        ]
        total = sum(shapes[site][0] * shapes[site][1] for site in present)
        self._storage = SlotStorage(len(self.slots), total, self.dtype, self.model.device)
        self._columns = {"matrix": slice(0, None)}
        by_site: dict[str, Trained] = {}
        first = 0
        for site in sorted(shapes):
            m, n = shapes[site]
            rows = m if site in present else 0
            starts = [slot.start[site] for slot in self.slots]
            by_site[site] = Whole(self._storage.leaf(first, rows, n), starts)
            first += rows * n
        return by_site

    def _penalised(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return the strengths and the ranks to keep of all slots, per site with a penalty."""
        named = sorted({s for slot in self.slots if slot.penalty for s in slot.penalty.keep})
        penalties = []
        for site in named:
            terms = [
                (slot.penalty.strength, slot.penalty.keep[site])
                if slot.penalty and site in slot.penalty.keep
                else (0.0, 0)
                for slot in self.slots
            ]
            strengths = torch.tensor([strength for strength, _ in terms], dtype=self.dtype)
            keeps = torch.tensor([keep for _, keep in terms])
            device = self.model.device
            penalties.append((site, strengths.to(device), keeps.to(device)))
        return penalties

    def __enter__(self) -> Cohort:
        with ExitStack() as attached:
            attached.enter_context(with_sums(self.model, self._swapped))
            for site, layer in self._layers.items():
                if layer.acts or self._meter is not None:
                    module = self.model.module.get_submodule(site)
                    attached.callback(module.register_forward_hook(layer.hook).remove)
            if self._meter is not None:
                embedding = self.model.module.get_input_embeddings()
                attached.callback(embedding.register_forward_hook(self._embedded).remove)
            self._attached = attached.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._attached.close()

    def route(self, parts: Sequence[Part]) -> Routing:
        """Say whose rows the next batches hold: the parts' rows follow each other in this order.

        Returns what `reroute` takes, to come back to a batch whose backward pass is yet to be made.
        Raises SiteError if a part names no slot of this cohort, or one slot twice, or has no row,
        or is to be scored in a cohort that was not made for it.
        """
        routing = Routing(parts, len(self.slots), self.model.device)
        if routing.scored and self._meter is None:
            raise SiteError(
                "Cohort.route: a part is to be scored; expected a cohort made with scored=True"
            )
        self.reroute(routing)
        return routing

    def reroute(self, routing: Routing) -> None:
        """Say that the next pass is over the batch of an earlier `route`."""
        for layer in self._layers.values():
            layer.routing, layer.resting = routing, False
        self._scoring = routing.scored

    def rest(self) -> None:
        """Let nothing of this cohort act until the next `route`, though it is attached.

        So several cohorts with sites in common can be attached to one model. What is merged into
        weights stays there; elsewhere it rests too.
        """
        for layer in self._layers.values():
            layer.resting = True
        self._scoring = False

    def _embedded(self, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Let a gradient reach all sites of a pass that is scored."""
        if not self._scoring or not torch.is_grad_enabled() or out.requires_grad:
            return out
        return out.detach().requires_grad_().clone()  # A copy: the model may write to what it gets.

    def parameters(self, k: int) -> list[nn.Parameter]:
        """Return what slot k trains: all its A and all its B, each as one flat vector.

        A fixed factor is not among them, and a sparse or dense slot has one vector of values.
        They are views of what the layers compute with, and so are their gradients: an optimizer
        made of them trains slot k and no other. The padding of shorter slots lies among them as
        zeros with zero gradients, which change no norm and which no optimizer moves.
        """
        left = {"a", "b"} - set(TRAINED[self.slots[k].train])
        columns = [where for name, where in self._columns.items() if name not in left]
        return [self._storage.parameter(k, where) for where in columns]

    def zero_gradients(self, slots: Sequence[int] | None = None) -> None:
        """Set the gradients and sums of these slots to zero, in place; None: of all."""
        self._storage.zero_gradients(slots)
        if self._meter is not None:
            self._meter.zero(slots)

    def scores(self, k: int, metric: str) -> dict[str, float]:
        """Return how important each site is to slot k, by a metric of `METRICS`.

        Of the loss whose gradients came in scored passes since `zero_gradients`; zero at a site
        that no gradient reached. SiteError for another metric, or a cohort not made for scoring.
        """
        check_metric("Cohort.scores", metric)
        if self._meter is None:
            raise SiteError("Cohort.scores: expected a cohort made with scored=True")
        return self._meter.scores(k, metric)

    @property
    def sums(self) -> list[Tensor]:
        """What scores are made of, as it is kept, to be copied and put back; [] without scoring."""
        return [] if self._meter is None else [self._meter.sums()]

    def add_penalties(self, slots: Sequence[int] | None = None) -> None:
        """Add the gradients of these slots' penalties; None: of all.

        A penalty is λ‖B[:, keep:]‖_F·‖A[keep:]‖_F per site.
        """
        if slots is not None and not any(self.slots[k].penalty for k in slots):
            return
        chosen = torch.tensor([slots is None or k in slots for k in range(len(self.slots))])
        for site, strengths, keeps in self._penalties:
            mine = strengths * chosen.to(strengths)
            self._layers[site].trained.penalise(mine, keeps)

    def adapter(self, k: int) -> Adapter[Delta]:
        """Return a copy of slot k's factors at their true ranks, with s folded into B again.

        A sparse slot gives its values at the positions of its start, a dense one its matrices. A
        fixed factor is that of the start, bit by bit: dividing s out and multiplying rounds.
        """
        slot = self.slots[k]
        return Adapter(
            {
                site: _with_fixed(layer.trained.read(k, slot.start[site]), slot.start[site], slot)
                for site, layer in self._layers.items()
            }
        )


def applied(model: LoadedModel, adapter: Adapter | None) -> Cohort:
    """Return the context in which the adapter acts without being trained; None: the bare base.

    It may lack sites and have any rank, also one above its matrices', as a sum of adapters may.
    Factors act as factors, all else as a dense matrix.
    """
    zero = {
        site: LowRank.zero(*shape, device=model.device) for site, shape in model.spec.shapes.items()
    }
    deltas: dict[str, Delta] = {} if adapter is None else dict(adapter)
    factors = {site: delta for site, delta in deltas.items() if isinstance(delta, LowRank)}
    whole = {s: Dense(delta.dense()) for s, delta in deltas.items() if s not in factors}
    slot = Slot(Adapter(zero), dict.fromkeys(zero, 1.0), Adapter(factors))
    return Cohort(model, [slot], Adapter(whole))


def _with_fixed(trained: Delta, start: Delta, slot: Slot) -> Delta:
    """Return what was trained, with copies of the start's fixed factors."""
    names = fixed(start, slot.train) if isinstance(start, LowRank) else ()
    if not names:
        return trained
    tensors, given = trained.tensors(), start.tensors()
    return from_tensors(
        tensors | {name: given[name].to(tensors[name], copy=True) for name in names}
    )


def _values(start: Delta) -> int:
    """The number of values that are trained at a site of a sparse slot."""
    return 0 if isinstance(start, LowRank) else len(start.tensors()["values"])
