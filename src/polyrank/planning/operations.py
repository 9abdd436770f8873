"""Operations of an optimizer step on each side of a cut."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.planning.anatomy import Anatomy, Section
from polyrank.planning.cut import CutPoint
from polyrank.planning.site_index import Ranks, SiteIndex
from polyrank.planning.workload import Workload


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


class Arithmetic:
    """The operations of one model's training under one workload."""

    def __init__(self, anatomy: Anatomy, sites: SiteIndex, workload: Workload):
        self._anatomy, self._places, self._workload = anatomy, sites, workload
        self._spent_of: dict[tuple[int, bool, frozenset[str]], tuple[int, int, frozenset[str]]] = {}
        self._tokens = workload.batch * workload.length
        self._end = anatomy.end.section(workload.length)

    def of(self, ranks: Ranks, cut: CutPoint | None) -> Operations:
        """Return the operations of an optimizer step, forward and backward.

        A frozen product takes 2mn per token forward, and as much backward where its input needs a
        gradient; factors take 2r(m+n) forward and twice that backward (less 2rn where the site's
        input needs none). Checkpointed blocks run forward twice.
        """
        count = len(self._anatomy.blocks)
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
        steps = self._workload.accumulation
        attention = first_attention + middle_attention + last_attention
        return Operations(client * steps, server * steps, attention * steps)

    def _spend(self, blocks: range, entered: bool, ranks: Ranks) -> tuple[int, int, bool]:
        """Return the operations of consecutive blocks, those in attention, and whether back."""
        total = attention = 0
        again = 1 + self._workload.checkpointing
        for block in blocks:
            active = self._places.active(block, ranks)
            kind = self._anatomy.blocks[block].kind
            section = self._anatomy.kinds[kind].section(self._workload.length)
            adapted = frozenset(active)
            key = (kind, entered, adapted)
            if key not in self._spent_of:
                cost = self._section_cost(section, entered, adapted, again=True)
                self._spent_of[key] = (*cost, section.reached(entered, adapted))
            spent, inside, reached = self._spent_of[key]
            for place, site in self._places.of(block):
                rank = active.get(place, 0)
                forward = 2 * rank * (site.m + site.n)
                backward = 2 * forward - (0 if place in reached else 2 * rank * site.n)
                spent += (again * forward + backward) * self._tokens
            total, attention = total + spent, attention + inside
            entered = entered or bool(active)
        return total, attention, entered

    def _section_cost(
        self, section: Section, entered: bool, adapted: frozenset[str], *, again: bool
    ) -> tuple[int, int]:
        """Return the operations of the frozen products, and those in attention of them."""
        load = self._workload
        total = attention = 0.0
        lives = section.alive(entered, adapted)
        back = again and load.checkpointing and (entered or bool(adapted))
        # The second forward pass ends with what a block keeps last, before that is computed.
        end = max(
            (
                i
                for i, node in enumerate(section.nodes)
                if node.saved or node.product or node.site in adapted
            ),
            default=0,
        )
        for i, (node, is_alive) in enumerate(zip(section.nodes, lives, strict=True)):
            if node.product is None:
                continue
            product_ops = node.product.at(load.batch, load.length, load.batch * load.targets)
            forward = product_ops * (1 + (back and i < end))
            inputs = sum(entered if j < 0 else lives[j] for j in node.inputs)
            per_pass = inputs if node.backward is None else node.backward
            spent = forward + (product_ops * per_pass if is_alive else 0)
            total += spent
            attention += spent if node.attention else 0
        return round(total), round(attention)
