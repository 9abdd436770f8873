"""What stays in memory between the forward and the backward pass, and what passes beside it."""

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
class Kept:
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
class Held:
    """Bytes that stay until the backward pass, and the most that pass beside them."""

    stays: int
    passes: int

    def __add__(self, other: Held) -> Held:
        return Held(self.stays + other.stays, self.passes + other.passes)

    def beside(self, other: Held) -> Held:
        """Return what both hold, where only one of them works at a time."""
        return Held(self.stays + other.stays, max(self.passes, other.passes))


class Activations:
    """The activations of one model's training under one workload."""

    def __init__(self, anatomy: Anatomy, places: SiteIndex, workload: Workload):
        self._anatomy, self._places, self._workload = anatomy, places, workload
        self._kept_of: dict[tuple[int, bool, frozenset[str]], Kept] = {}
        self._tokens = workload.batch * workload.length
        self._end = anatomy.end.section(workload.length)

    def client(self, ranks: Ranks, cut: CutPoint | None) -> Held:
        """Return what the client holds."""
        count = len(self._anatomy.blocks)
        if cut is None:
            kept, _ = self._run(range(count), self._workload.scored, ranks)
            held = self._through_the_end(kept)
        else:
            kept, _ = self._run(range(cut.lower), self._workload.scored, ranks)
            one = microbatch(self._workload, self._anatomy.hidden, labels=cut.upper is None)
            held = self._in_flight(kept) + Held(0, 2 * one.activations)
            if cut.upper is not None:
                last, _ = self._run(range(cut.upper, count), True, ranks)
                held = held.beside(self._through_the_end(last) + Held(0, 2 * self._states))
        return held

    def server(self, ranks: Ranks, cut: CutPoint | None) -> Held:
        """Return what a client's tail holds at the server."""
        if cut is None:
            return Held(0, 0)
        count = len(self._anatomy.blocks)
        if cut.upper is None:
            kept, _ = self._run(range(cut.lower, count), True, ranks)
            held = self._through_the_end(kept)
        else:
            kept, _ = self._run(range(cut.lower, cut.upper), True, ranks)
            held = self._in_flight(kept)
        held += Held(0, 2 * self._states)
        return held

    @property
    def _states(self) -> int:
        """Bytes of one microbatch's hidden states."""
        return self._tokens * self._anatomy.hidden * self._workload.itemsize

    def _in_flight(self, kept: Kept) -> Held:
        """Return the bytes of all microbatches that are under way, each with what it sends."""
        one, passes = kept.own, kept.working
        if self._workload.checkpointing:
            one, passes = kept.entries, kept.largest
        return Held(self._workload.under_way * (one + self._states) + kept.common, passes)

    def _through_the_end(self, kept: Kept) -> Held:
        """Return the bytes of one microbatch that goes through the end and back."""
        load = self._workload
        end = sum(self._bytes(self._end, storage) for storage in self._end.kept(True, frozenset()))
        logits = load.batch * load.targets * self._anatomy.vocabulary
        wide = 1 if load.itemsize >= load.factor_itemsize else 2
        loss = min(logits, CHUNK) * load.factor_itemsize * wide
        first = max(loss, working_bytes(self._end, True, {}, self._size))
        # Later the end's activations are freed, and the logits live on.
        later = kept.largest if load.checkpointing else kept.working
        blocks = kept.entries if load.checkpointing else kept.own
        passes = max(first, later + logits * load.itemsize - end)
        return Held(blocks + kept.common + end, passes)

    def _run(self, blocks: range, entered: bool, ranks: Ranks) -> tuple[Kept, bool]:
        """Return what consecutive blocks keep, and whether what leaves them needs a gradient."""
        own = entries = largest = working = 0
        shared: dict[str, int] = {}
        for block in blocks:
            active = self._places.active(block, ranks)
            if not (entered or active):
                continue
            kept = self._block(block, entered, frozenset(active))
            wide = sum(active.values()) * self._tokens * self._workload.factor_itemsize
            working = max(0, kept.working, working - kept.own - wide)
            own += kept.own + wide
            entries += self._states
            largest = max(largest, kept.largest + wide + kept.working)
            shared |= kept.shared or {}
            entered = True
        return Kept(own, shared, entries, largest, working), entered

    def _block(self, block: int, entered: bool, adapted: frozenset[str]) -> Kept:
        """Return what a block keeps, beside the rank-wide products of its adapters.

        Factors keep their site's input: the very tensor where the base computes in the factors'
        precision, a copy of its own otherwise, and with dropout the masked copy and the mask.
        """
        kind = self._anatomy.blocks[block].kind
        key = (kind, entered, adapted)
        if key in self._kept_of:
            return self._kept_of[key]
        section = self._anatomy.kinds[kind].section(self._workload.length)
        kept = set(section.kept(entered, adapted))
        reached = section.reached(entered, adapted)
        at_sites = {
            place: self._at_site(site, place in reached)
            for place, site in self._places.of(block)
            if place in adapted
        }
        kept |= {section.inputs[place] for place, one in at_sites.items() if one.shares}
        if self._workload.scored:
            for place, site in self._places.of(block):
                at_sites[place] = self._scored(site, at_sites.get(place, AtSite()))
        extra = sum(one.kept for one in at_sites.values())
        shared = {
            name: self._bytes(section, i)
            for i in kept
            if (name := section.storages[i].shared) is not None
        }
        own = extra + sum(
            self._bytes(section, i) for i in kept if section.storages[i].shared is None
        )
        entry = self._bytes(section, section.entry) if section.entry in kept else 0
        working = working_bytes(section, entered, at_sites, self._size)
        found = Kept(own, shared, entry, own - entry, working)
        self._kept_of[key] = found
        return found

    def _at_site(self, site: Site, reached: bool) -> AtSite:
        load, tokens = self._workload, self._tokens
        wide = load.factor_itemsize != load.itemsize
        copies = 1 + reached if load.dropout else int(wide)
        back = site.n * tokens * load.itemsize * reached
        converted = (site.m + site.n * reached) * tokens * load.factor_itemsize * wide
        return AtSite(
            kept=copies * site.n * tokens * load.factor_itemsize,
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
            kept=factors.kept + numbers * load.itemsize,
            passing=max(factors.passing, copies * numbers * load.factor_itemsize),
        )

    def _bytes(self, section: Section, storage: int) -> int:
        return self._size(section.storages[storage].size)

    def _size(self, size: Size) -> int:
        load = self._workload
        return size.at(load.batch, load.length, load.batch * load.targets)
