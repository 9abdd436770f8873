"""The costs of training: memory, operations, bytes and time, from a model's anatomy alone.

    costs = CostModel(anatomy, spec, Workload(batch=4, length=512, targets=128))
    costs.memory(ranks, Split(8)).total      # bytes at the client

Memory is what is held at the peak of an optimizer step. Not counted are the short-lived results of
single operations, what an allocator loses to fragmentation, and the program itself: leave a margin
(docs/explanation/cost-model.md says how large it was found to be).
"""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.errors import ModelError
from polyrank.planning.activations import Activations, PeakMemory
from polyrank.planning.anatomy import Anatomy
from polyrank.planning.cut import CutPoint
from polyrank.planning.operations import Arithmetic, Operations
from polyrank.planning.site_index import Ranks, SiteIndex
from polyrank.planning.spec import ModelSpec
from polyrank.planning.timing import Clock, Machine, Seconds, step_seconds
from polyrank.planning.traffic import WireBytes, messages, step_traffic
from polyrank.planning.workload import Workload

__all__ = ["CostModel", "Machine", "Memory", "Operations", "Seconds", "WireBytes"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one machine at the peak of an optimizer step.

    `activations` stay from the forward pass to the backward pass, logits among them; `temporary` is
    the most that is there beside them: the loss in float32, gradients on their way, frames, and
    under checkpointing the block that is computed again.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        trained = self.adapters + self.gradients + self.optimizer
        return self.weights + trained + self.activations + self.temporary


class CostModel:
    """Costs of training clients of one model under one workload.

    `ranks` are per site; sites without one are not adapted. `cut` None is a whole client. All costs
    are of one client, alone on its machine. Weights are counted as numbers of `workload.itemsize`
    bytes, which must be that of the anatomy.

    Raises ModelError if the anatomy is of another number format or of another model than the
    specification, SiteError for a rank of an unknown site, RankError for one below 0.
    """

    def __init__(self, anatomy: Anatomy, spec: ModelSpec, workload: Workload):
        if anatomy.itemsize != workload.itemsize:
            raise ModelError(
                f"costs: the anatomy is of a base with {anatomy.itemsize} bytes per number, the "
                f"workload says {workload.itemsize}; make the anatomy in the base's number format"
            )
        if len(anatomy.blocks) != spec.blocks:
            raise ModelError(
                f"costs: the anatomy has {len(anatomy.blocks)} blocks, the specification "
                f"{spec.blocks}; both must be of one model"
            )
        self.anatomy, self.spec, self.workload = anatomy, spec, workload
        self._places = SiteIndex(anatomy, spec)
        self._activations = Activations(anatomy, self._places, workload)
        self._arithmetic = Arithmetic(anatomy, self._places, workload)

    def memory(self, ranks: Ranks, cut: CutPoint | None) -> Memory:
        """Return the bytes at the client."""
        self._places.check(ranks)
        count = self.spec.blocks
        blocks = frozenset(range(count)) if cut is None else cut.at_client(count)
        weights = self.anatomy.parameters(blocks) * self.workload.itemsize
        return self._memory(weights, ranks, blocks, self._activations.client(ranks, cut))

    def server_memory(self, ranks: Ranks, cut: CutPoint | None) -> Memory:
        """Return the bytes that a client's tail takes at the server, without the base's weights.

        Those are there once for all clients: see `server_weights`.
        """
        self._places.check(ranks)
        blocks = frozenset[int]() if cut is None else cut.at_server(self.spec.blocks)
        return self._memory(0, ranks, blocks, self._activations.server(ranks, cut))

    def server_weights(self, cut: CutPoint | None) -> int:
        """Return the bytes of the base that the server holds for clients of this cut."""
        if cut is None:
            return 0
        blocks_at_server = cut.at_server(self.spec.blocks)
        return self.anatomy.parameters(blocks_at_server) * self.workload.itemsize

    def _memory(
        self, weights: int, ranks: Ranks, blocks: frozenset[int], activations: PeakMemory
    ) -> Memory:
        factors = self._places.factors(ranks, blocks) * self.workload.factor_itemsize
        copies = self.workload.moments + self.workload.proximal
        return Memory(
            weights, factors, factors, copies * factors, activations.stays, activations.passes
        )

    def operations(self, ranks: Ranks, cut: CutPoint | None) -> Operations:
        """Return the operations of an optimizer step, forward and backward."""
        self._places.check(ranks)
        return self._arithmetic.of(ranks, cut)

    def wire(self, cut: CutPoint | None) -> WireBytes:
        """Return the bytes of an optimizer step on the link; none for a whole client.

        As the frames have it, but for the client's name in each of them.
        """
        return step_traffic(self.workload, self.anatomy.hidden, cut)

    def adapter_bytes(self, ranks: Ranks, cut: CutPoint | None) -> WireBytes:
        """Return the bytes of a round's factors of the client's sites, down and up again."""
        self._places.check(ranks)
        count = self.spec.blocks
        blocks = range(count) if cut is None else cut.at_client(count)
        once = self._places.factors(ranks, blocks) * self.workload.factor_itemsize
        return WireBytes(once, once)

    def seconds(
        self, ranks: Ranks, cut: CutPoint | None, device: Machine, server: Machine, steps: int
    ) -> Seconds:
        """Return the time of a step and of a round of so many steps.

        A round downloads the client's factors, takes its steps and uploads the factors.
        """
        spent, sent = self.operations(ranks, cut), self.adapter_bytes(ranks, cut)
        clock = Clock(device, server)
        step = step_seconds(
            clock,
            (spent.client, spent.server),
            self.wire(cut),
            cut,
            messages(self.workload, cut),
            self.workload.under_way,
        )
        whole = clock.down(sent.down, 1) + steps * step + clock.up(sent.up, 1)
        return Seconds(step, whole, clock.ignored)
