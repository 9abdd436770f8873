"""The memory of the backward pass through a block, beside what the forward pass saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from polyrank.planning.anatomy import ENTRY, Section, Size


@dataclass(frozen=True)
class AtSite:
    """What factors, or scoring, at a site add to a backward pass, in bytes.

    `kept` is what they keep of their own, freed with them; with `shares` they keep the very input
    of the site. `passing` is what their gradients take while they are made, `input` the gradient of
    the site's input, to which the frozen matrix's own will be added.
    """

    saved: int = 0
    shares: bool = False
    passing: int = 0
    input: int = 0


def working_bytes(
    section: Section,
    entered: bool,
    adapted: Mapping[str, AtSite],
    size: Callable[[Size], int],
) -> int:
    """Return the most that gradients take at once, less what has been freed by then.

    The nodes are gone through in autograd's own order, last made first. Each turns the gradient of
    its result into those of its inputs; then its own gradient goes, and what it alone kept. The
    gradient of the section's result is counted. What blocks share is never freed.
    """
    lives = section.alive(entered, adapted.keys())
    saved = section.saved_by_node(entered, adapted.keys())
    for i, node in enumerate(section.nodes):
        if node.site is not None and node.site in adapted and adapted[node.site].shares:
            saved[i].add(section.inputs[node.site])
    users = Counter(storage for storages in saved for storage in storages)
    gradients = _Gradients()
    freed = most = carried = 0
    root = len(section.nodes) - 1
    gradients.make(root, size(section.nodes[root].nbytes))
    for i in range(root, -1, -1):
        node = section.nodes[i]
        factors = adapted.get(node.site or "")
        if not (lives[i] and gradients.has(i)):
            continue
        for j in node.inputs:
            if not (entered if j == ENTRY else lives[j]):
                continue
            if node.passes:
                gradients.share(i, j)
                continue
            entry = section.storages[section.entry].size
            gradients.make(j, size(entry if j == ENTRY else section.nodes[j].nbytes))
            most = max(most, gradients.most + carried - freed)
            gradients.settle()
        passing = 0 if factors is None else factors.passing + factors.input
        most = max(most, gradients.now + carried + passing - freed)
        gradients.drop(i)
        if factors is not None:
            carried, freed = factors.input, freed + factors.saved
        elif not node.passes:
            carried = 0
        for storage in saved[i]:
            users[storage] -= 1
            if not users[storage] and section.storages[storage].shared is None:
                freed += size(section.storages[storage].size)
    return most


class _Gradients:
    """The gradients that wait for their nodes; several nodes may wait for one and the same."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}
        self._bytes: list[int] = []
        self._holders: Counter[int] = Counter()
        self.now = 0
        self._added = 0

    @property
    def most(self) -> int:
        """Bytes of all, and of one that is just being added to another."""
        return self.now + self._added

    def has(self, node: int) -> bool:
        """Whether a gradient waits for this node."""
        return node in self._of

    def make(self, node: int, nbytes: int) -> None:
        """Give a node a gradient of its own; one that it has already takes it in."""
        if node in self._of:
            self._added = nbytes
            return
        self._of[node] = len(self._bytes)
        self._holders[len(self._bytes)] = 1
        self._bytes.append(nbytes)
        self.now += nbytes

    def settle(self) -> None:
        """Let what was added go."""
        self._added = 0

    def share(self, node: int, earlier: int) -> None:
        """Give another node the gradient of this one."""
        if earlier not in self._of:
            self._of[earlier] = self._of[node]
            self._holders[self._of[node]] += 1

    def drop(self, node: int) -> None:
        """Let the gradient of a node go."""
        gradient = self._of.pop(node)
        self._holders[gradient] -= 1
        if not self._holders[gradient]:
            self.now -= self._bytes[gradient]
