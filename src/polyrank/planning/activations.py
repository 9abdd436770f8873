"""Activations that stay in memory until the backward pass, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from polyrank.planning.anatomy import Anatomy, Section, Size
from polyrank.planning.backward import AtSite, working_bytes
from polyrank.planning.cut import CutPoint
from polyrank.planning.site_index import Ranks, SiteIndex
from polyrank.planning.spec import Site
from polyrank.planning.traffic import microbatch
from polyrank.planning.workload import Workload

CHUNK = 2**25
"""Logits that the loss looks at together, in the precision of the factors."""


@dataclass(frozen=True)
class BlockMemory:
    """Bytes that a run of blocks keeps: all that is its own, by what blocks share, its entries.

    `largest` is the most that one block keeps beside the hidden states that enter it, and takes in
    its backward pass; `working` the most that a backward pass takes beside all that is kept.
    """

    own: int = 0
    shared: Mapping[str, int] | None = None
    entries: int = 0
    largest: int = 0
    working: int = 0

    @property
    def common(self) -> int:
        """Bytes of masks and positions, which the blocks of all microbatches share."""
        return sum((self.shared or {}).values())


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that stay until the backward pass, and the most that pass beside them."""

    stays: int
    passes: int

    def __add__(self, more: PeakMemory) -> PeakMemory:
        return PeakMemory(self.stays + more.stays, self.passes + more.passes)

    def beside(self, more: PeakMemory) -> PeakMemory:
        """Return what both hold, where only one of them works at a time."""
        return PeakMemory(self.stays + more.stays, max(self.passes, more.passes))


class Activations:
    """The activations of one model's training under one workload."""

    def __init__(self, anatomy: Anatomy, sites: SiteIndex, workload: Workload):
        self._anatomy, self._sites, self._workload = anatomy, sites, workload
        self._block_memory: dict[tuple[int, bool, frozenset[str]], BlockMemory] = {}
        self._tokens = workload.batch * workload.length
        self._end = anatomy.end.section(workload.length)

    def client(self, ranks: Ranks, cut: CutPoint | None) -> PeakMemory:
        """Return the activations of the client."""
        count = len(self._anatomy.blocks)
        if cut is None:
            saved, _ = self._run(range(count), self._workload.scored, ranks)
            memory = self._through_the_end(saved)
        else:
            saved, _ = self._run(range(cut.lower), self._workload.scored, ranks)
            frames = microbatch(self._workload, self._anatomy.hidden, labels=cut.upper is None)
            memory = self._in_flight(saved) + PeakMemory(0, 2 * frames.activations)
            if cut.upper is not None:
                last, _ = self._run(range(cut.upper, count), True, ranks)
                memory = memory.beside(
                    self._through_the_end(last) + PeakMemory(0, 2 * self._states)
                )
        return memory

    def server(self, ranks: Ranks, cut: CutPoint | None) -> PeakMemory:
        """Return the activations of a client's tail at the server."""
        if cut is None:
            return PeakMemory(0, 0)
        count = len(self._anatomy.blocks)
        if cut.upper is None:
            saved, _ = self._run(range(cut.lower, count), True, ranks)
            memory = self._through_the_end(saved)
        else:
            saved, _ = self._run(range(cut.lower, cut.upper), True, ranks)
            memory = self._in_flight(saved)
        memory += PeakMemory(0, 2 * self._states)
        return memory

    @property
    def _states(self) -> int:
        """Bytes of one microbatch's hidden states."""
        return self._tokens * self._anatomy.hidden * self._workload.itemsize

    def _in_flight(self, saved: BlockMemory) -> PeakMemory:
        """Return the bytes of all microbatches that are under way, each with what it sends."""
        each, passes = saved.own, saved.working
        if self._workload.checkpointing:
            each, passes = saved.entries, saved.largest
        return PeakMemory(self._workload.under_way * (each + self._states) + saved.common, passes)

    def _through_the_end(self, saved: BlockMemory) -> PeakMemory:
        """Return the bytes of one microbatch that goes through the end and back."""
        load = self._workload
        end = sum(self._bytes(self._end, storage) for storage in self._end.saved(True, frozenset()))
        logits = load.batch * load.targets * self._anatomy.vocabulary
        wide = 1 if load.itemsize >= load.factor_itemsize else 2
        loss = min(logits, CHUNK) * load.factor_itemsize * wide
        first = max(loss, working_bytes(self._end, True, {}, self._size))
        # Later the end's activations are freed, and the logits live on.
        later = saved.largest if load.checkpointing else saved.working
        blocks = saved.entries if load.checkpointing else saved.own
        passes = max(first, later + logits * load.itemsize - end)
        return PeakMemory(blocks + saved.common + end, passes)

    def _run(self, blocks: range, entered: bool, ranks: Ranks) -> tuple[BlockMemory, bool]:
        """Return what consecutive blocks keep, and whether what leaves them needs a gradient."""
        own = entries = largest = working = 0
        shared: dict[str, int] = {}
        for block in blocks:
            active = self._sites.active(block, ranks)
            if not (entered or active):
                continue
            saved = self._block(block, entered, frozenset(active))
            wide = sum(active.values()) * self._tokens * self._workload.factor_itemsize
            working = max(0, saved.working, working - saved.own - wide)
            own += saved.own + wide
            entries += self._states
            largest = max(largest, saved.largest + wide + saved.working)
            shared |= saved.shared or {}
            entered = True
        return BlockMemory(own, shared, entries, largest, working), entered

    def _block(self, block: int, entered: bool, adapted: frozenset[str]) -> BlockMemory:
        """Return what a block keeps, beside the rank-wide products of its adapters.

        Factors keep their site's input: the very tensor where the base computes in the factors'
        precision, a copy of its own otherwise, and with dropout the masked copy and the mask.
        """
        kind = self._anatomy.blocks[block].kind
        key = (kind, entered, adapted)
        if key in self._block_memory:
            return self._block_memory[key]
        section = self._anatomy.kinds[kind].section(self._workload.length)
        saved = set(section.saved(entered, adapted))
        reached = section.reached(entered, adapted)
        at_sites = {
            place: self._at_site(site, place in reached)
            for place, site in self._sites.of(block)
            if place in adapted
        }
        saved |= {
            section.inputs[place] for place, site_memory in at_sites.items() if site_memory.shares
        }
        if self._workload.scored:
            for place, site in self._sites.of(block):
                at_sites[place] = self._scored(site, at_sites.get(place, AtSite()))
        extra = sum(site_memory.saved for site_memory in at_sites.values())
        shared = {
            name: self._bytes(section, i)
            for i in saved
            if (name := section.storages[i].shared) is not None
        }
        own = extra + sum(
            self._bytes(section, i) for i in saved if section.storages[i].shared is None
        )
        entry = self._bytes(section, section.entry) if section.entry in saved else 0
        working = working_bytes(section, entered, at_sites, self._size)
        block_memory = BlockMemory(own, shared, entry, own - entry, working)
        self._block_memory[key] = block_memory
        return block_memory

    def _at_site(self, site: Site, reached: bool) -> AtSite:
        load, tokens = self._workload, self._tokens
        wide = load.factor_itemsize != load.itemsize
        copies = 1 + reached if load.dropout else int(wide)
        back = site.n * tokens * load.itemsize * reached
        converted = (site.m + site.n * reached) * tokens * load.factor_itemsize * wide
        return AtSite(
            saved=copies * site.n * tokens * load.factor_itemsize,
            shares=not copies,
            passing=converted,
            input=back,
        )

    def _scored(self, site: Site, factors: AtSite) -> AtSite:
        """Return the same with the site's output kept, which is measured on the way back.

        It meets its gradient in the precision of the factors, once those have had theirs.
        """
        load, numbers = self._workload, site.m * self._tokens
        copies = 1 + (load.factor_itemsize != load.itemsize)
        return replace(
            factors,
            saved=factors.saved + numbers * load.itemsize,
            passing=max(factors.passing, copies * numbers * load.factor_itemsize),
        )

    def _bytes(self, section: Section, storage: int) -> int:
        return self._size(section.storages[storage].size)

    def _size(self, size: Size) -> int:
        load = self._workload
        return size.at(load.batch, load.length, load.batch * load.targets)
