"""Bytes that travelled in a round, per client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes up per client, and those within them, and down, that crossed split clients' cuts.

    What is dealt to a client is not counted here: the round knows it.
    """

    up: Counter[str] = field(default_factory=Counter)
    wire_up: Counter[str] = field(default_factory=Counter)
    wire_down: Counter[str] = field(default_factory=Counter)

    def crossed(self, client: str, up: int, down: int) -> int:
        """Count a client's activations and gradients, once; return the bytes up that are new."""
        if client in self.wire_up:
            return 0
        self.wire_up[client], self.wire_down[client] = up, down
        return up


def added(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return {client: {"up", "down"}} summed over several such tables, in order of the names."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for client, counts in part.items():
            total.setdefault(client, Counter()).update(counts)
    return {
        client: {"up": total[client]["up"], "down": total[client]["down"]}
        for client in sorted(total)
    }
