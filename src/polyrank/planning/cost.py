"""What training costs: memory, operations, bytes and time, from a model's anatomy alone.

    costs = CostModel(anatomy, spec, Workload(batch=4, length=512, targets=128))
    costs.memory(ranks, Split(8)).total      # bytes at the client

Memory is what is held at the peak of an optimizer step. Not counted are the short-lived results of
single operations, what an allocator loses to fragmentation, and the program itself: leave a margin
(docs/cost-model.md says how large it was found to be).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from polyrank.errors import ModelError, RankError, SiteError
from polyrank.planning.anatomy import Anatomy, Section
from polyrank.planning.spec import ModelSpec, Site
from polyrank.planning.split import Split
from polyrank.planning.timing import Clock, Machine, Seconds, step_seconds
from polyrank.planning.traffic import Wire, messages, microbatch, step_traffic
from polyrank.planning.workload import Workload

__all__ = ["CostModel", "Machine", "Memory", "Operations", "Seconds", "Wire"]

CHUNK = 2**25
"""Logits that the loss looks at together, in the precision of the factors."""

Ranks = Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes on one machine at the peak of an optimizer step."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one optimizer step on each side; a multiply-add is two.

    Those of matrix products; `attention` is what of both sides is spent in the products of queries,
    keys and values, which count what is computed: half of all pairs in a causal kernel without a
    mask, all pairs otherwise.
    """

    client: int
    server: int
    attention: int = 0


@dataclass(frozen=True)
class _Kept:
    """Bytes that a run of blocks keeps: all that is its own, by what blocks share, its entries.

    `largest` is the most that one block keeps beside the hidden states that enter it.
    """

    own: int = 0
    shared: Mapping[str, int] | None = None
    entries: int = 0
    largest: int = 0

    @property
    def common(self) -> int:
        """Bytes of masks and positions, which the blocks of all microbatches share."""
        return sum((self.shared or {}).values())


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
        self._sites: list[list[tuple[str, Site]]] = [[] for _ in anatomy.blocks]
        for site in spec.sites:
            role = site.name.removeprefix(f"{anatomy.blocks[site.block].prefix}.")
            self._sites[site.block].append((role, site))
        self._names = frozenset(site.name for site in spec.sites)
        self._kept_of: dict[tuple[int, bool, frozenset[str]], _Kept] = {}
        self._spent_of: dict[tuple[int, bool, frozenset[str]], tuple[int, int]] = {}
        self._tokens = workload.batch * workload.length
        self._end = anatomy.end.section(workload.length)

    # --- memory ---

    def memory(self, ranks: Ranks, cut: Split | None) -> Memory:
        """Return the bytes at the client."""
        self._check(ranks)
        count = self.spec.blocks
        blocks = frozenset(range(count)) if cut is None else cut.at_client(count)
        if cut is None:
            kept, _ = self._run(range(count), False, ranks)
            activations = self._peak(kept)
        else:
            kept, _ = self._run(range(cut.lower), False, ranks)
            one = microbatch(self.workload, self.anatomy.hidden, labels=cut.upper is None)
            activations = self._in_flight(kept) + 2 * one.activations
            if cut.upper is not None:
                last, _ = self._run(range(cut.upper, count), True, ranks)
                activations += self._peak(last) + 2 * self._states
        weights = self.anatomy.parameters(blocks) * self.workload.itemsize
        return self._memory(weights, ranks, blocks, activations)

    def server_memory(self, ranks: Ranks, cut: Split | None) -> Memory:
        """Return the bytes that a client's tail takes at the server, without the base's weights.

        Those are there once for all clients: see `server_weights`.
        """
        self._check(ranks)
        if cut is None:
            return Memory(0, 0, 0, 0, 0)
        count = self.spec.blocks
        if cut.upper is None:
            kept, _ = self._run(range(cut.lower, count), True, ranks)
            activations = self._peak(kept) + 2 * self._states
        else:
            kept, _ = self._run(range(cut.lower, cut.upper), True, ranks)
            activations = self._in_flight(kept) + 2 * self._states
        return self._memory(0, ranks, cut.at_server(count), activations)

    def server_weights(self, cut: Split | None) -> int:
        """Return the bytes of the base that the server holds for clients of this cut."""
        if cut is None:
            return 0
        held = cut.at_server(self.spec.blocks)
        return self.anatomy.parameters(held) * self.workload.itemsize

    @property
    def _states(self) -> int:
        """Bytes of one microbatch's hidden states."""
        return self._tokens * self.anatomy.hidden * self.workload.itemsize

    def _memory(
        self, weights: int, ranks: Ranks, blocks: frozenset[int], activations: int
    ) -> Memory:
        factors = self._factors(ranks, blocks) * self.workload.factor_itemsize
        copies = self.workload.moments + self.workload.proximal
        return Memory(weights, factors, factors, copies * factors, activations)

    def _factors(self, ranks: Ranks, blocks: Iterable[int]) -> int:
        """Return the numbers in the factors of some blocks."""
        return sum(
            ranks.get(site.name, 0) * (site.m + site.n)
            for block in blocks
            for _, site in self._sites[block]
        )

    def _in_flight(self, kept: _Kept) -> int:
        """Return the bytes of all microbatches that are under way, and of what was sent."""
        one, extra = kept.own, 0
        if self.workload.checkpointing:
            one, extra = kept.entries, kept.largest
        return self.workload.under_way * (one + self._states) + extra + kept.common

    def _peak(self, kept: _Kept) -> int:
        """Return the bytes of one microbatch that goes through the end and back."""
        load = self.workload
        targets = load.batch * load.targets
        end = sum(self._bytes(self._end, storage) for storage in self._end.kept(True, frozenset()))
        logits = targets * self.anatomy.vocabulary
        wide = 1 if load.itemsize >= load.factor_itemsize else 2
        loss = min(logits, CHUNK) * load.factor_itemsize * wide
        if not load.checkpointing:
            return kept.own + kept.common + end + loss
        back = kept.largest + logits * load.itemsize  # the logits live on in the backward pass
        return kept.entries + kept.common + max(end + loss, back)

    def _run(self, blocks: range, entered: bool, ranks: Ranks) -> tuple[_Kept, bool]:
        """Return what consecutive blocks keep, and whether what leaves them needs a gradient."""
        own = entries = largest = 0
        shared: dict[str, int] = {}
        for block in blocks:
            active = self._active(block, ranks)
            if not (entered or active):
                continue
            kept = self._block(block, entered, frozenset(active))
            wide = sum(active.values()) * self._tokens * self.workload.factor_itemsize
            own += kept.own + wide
            entries += self._states
            largest = max(largest, kept.largest + wide)
            shared |= kept.shared or {}
            entered = True
        return _Kept(own, shared, entries, largest), entered

    def _active(self, block: int, ranks: Ranks) -> dict[str, int]:
        """Return the ranks of a block's adapted sites, by their places in the block."""
        found = {role: ranks.get(site.name, 0) for role, site in self._sites[block]}
        return {role: rank for role, rank in found.items() if rank}

    def _block(self, block: int, entered: bool, adapted: frozenset[str]) -> _Kept:
        """Return what a block keeps, beside the rank-wide products of its adapters.

        An adapter keeps its site's input: the very tensor where the base computes in the factors'
        precision, a copy of its own otherwise, and with dropout the masked copy and the mask.
        """
        kind = self.anatomy.blocks[block].kind
        key = (kind, entered, adapted)
        if key in self._kept_of:
            return self._kept_of[key]
        load, section = self.workload, self.anatomy.kinds[kind].section(self.workload.length)
        kept = set(section.kept(entered, adapted))
        reached = section.reached(entered, adapted)
        copies = 0
        for role, site in self._sites[block]:
            if role not in adapted:
                continue
            if load.dropout:
                copies += site.n * (1 + (role in reached))
            elif load.factor_itemsize != load.itemsize:
                copies += site.n
            else:
                kept.add(section.inputs[role])
        extra = copies * self._tokens * load.factor_itemsize
        shared = {
            name: self._bytes(section, i)
            for i in kept
            if (name := section.storages[i].shared) is not None
        }
        own = extra + sum(
            self._bytes(section, i) for i in kept if section.storages[i].shared is None
        )
        entry = self._bytes(section, section.entry) if section.entry in kept else 0
        found = _Kept(own, shared, entry, own - entry)
        self._kept_of[key] = found
        return found

    def _bytes(self, section: Section, storage: int) -> int:
        load = self.workload
        return section.storages[storage].size.at(load.batch, load.length, load.batch * load.targets)

    # --- operations ---

    def operations(self, ranks: Ranks, cut: Split | None) -> Operations:
        """Return the operations of an optimizer step, forward and backward.

        A frozen product takes 2mn per token forward, and as much backward where its input needs a
        gradient; factors take 2r(m+n) forward and twice that backward (less 2rn where the site's
        input needs none). Checkpointed blocks run forward twice.
        """
        self._check(ranks)
        count = self.spec.blocks
        lower = count if cut is None else cut.lower
        upper = count if cut is None or cut.upper is None else cut.upper
        first, first_attention, entered = self._spend(range(lower), False, ranks)
        entered = entered or cut is not None
        middle, middle_attention, entered = self._spend(range(lower, upper), entered, ranks)
        last, last_attention, _ = self._spend(range(upper, count), entered, ranks)
        end, _ = self._section_cost(self._end, True, frozenset(), again=False)
        at_client = cut is None or cut.upper is not None
        client = first + (last + end if at_client else 0)
        server = middle + (0 if at_client else last + end)
        steps = self.workload.accumulation
        attention = first_attention + middle_attention + last_attention
        return Operations(client * steps, server * steps, attention * steps)

    def _spend(self, blocks: range, entered: bool, ranks: Ranks) -> tuple[int, int, bool]:
        """Return the operations of consecutive blocks, those in attention, and whether back."""
        total = attention = 0
        again = 1 + self.workload.checkpointing
        for block in blocks:
            active = self._active(block, ranks)
            kind = self.anatomy.blocks[block].kind
            section = self.anatomy.kinds[kind].section(self.workload.length)
            adapted = frozenset(active)
            key = (kind, entered, adapted)
            if key not in self._spent_of:
                self._spent_of[key] = self._section_cost(section, entered, adapted, again=True)
            spent, inside = self._spent_of[key]
            reached = section.reached(entered, adapted) if active else frozenset[str]()
            for role, site in self._sites[block]:
                rank = active.get(role, 0)
                forward = 2 * rank * (site.m + site.n)
                backward = 2 * forward - (0 if role in reached else 2 * rank * site.n)
                spent += (again * forward + backward) * self._tokens
            total, attention = total + spent, attention + inside
            entered = entered or bool(active)
        return total, attention, entered

    def _section_cost(
        self, section: Section, entered: bool, adapted: frozenset[str], *, again: bool
    ) -> tuple[int, int]:
        """Return the operations of the frozen products, and those in attention of them."""
        load = self.workload
        total = attention = 0.0
        lives = section.alive(entered, adapted)
        back = entered or bool(adapted)
        for node, is_alive in zip(section.nodes, lives, strict=True):
            if node.product is None:
                continue
            one = node.product.at(load.batch, load.length, load.batch * load.targets)
            forward = one * (1 + (again and load.checkpointing and back))
            inputs = sum(entered if i < 0 else lives[i] for i in node.inputs)
            per_pass = inputs if node.backward is None else node.backward
            spent = forward + (one * per_pass if is_alive else 0)
            total += spent
            attention += spent if node.attention else 0
        return round(total), round(attention)

    # --- bytes and seconds ---

    def wire(self, cut: Split | None) -> Wire:
        """Return the bytes of an optimizer step on the link; none for a whole client.

        As the frames have it, but for the client's name in each of them.
        """
        return step_traffic(self.workload, self.anatomy.hidden, cut)

    def adapter_bytes(self, ranks: Ranks, cut: Split | None) -> Wire:
        """Return the bytes of a round's factors of the client's sites, down and up again."""
        self._check(ranks)
        count = self.spec.blocks
        blocks = range(count) if cut is None else cut.at_client(count)
        once = self._factors(ranks, blocks) * self.workload.factor_itemsize
        return Wire(once, once)

    def seconds(
        self, ranks: Ranks, cut: Split | None, device: Machine, server: Machine, steps: int
    ) -> Seconds:
        """Return the time of a step and of a round of so many steps.

        A round downloads the client's factors, takes its steps and uploads the factors.
        """
        spent, dealt = self.operations(ranks, cut), self.adapter_bytes(ranks, cut)
        clock = Clock(device, server)
        step = step_seconds(
            clock,
            (spent.client, spent.server),
            self.wire(cut),
            cut,
            messages(self.workload, cut),
            self.workload.under_way,
        )
        whole = clock.down(dealt.down, 1) + steps * step + clock.up(dealt.up, 1)
        return Seconds(step, whole, clock.ignored)

    def _check(self, ranks: Ranks) -> None:
        unknown = sorted(set(ranks) - self._names)
        if unknown:
            raise SiteError(f"costs: ranks at {unknown[:5]}, which are not sites of the model")
        low = {site: rank for site, rank in ranks.items() if rank < 0}
        if low:
            raise RankError(f"costs: expected ranks of 0 or more, got {low}")
