"""Types that change from round to round."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from polyrank.errors import RankError
from polyrank.seeds import derive

EVERYONE = "*"
"""In a schedule: every client that it does not name."""


@dataclass(frozen=True)
class Trace:
    """Changes of type by round: from that round on a client has the type that is given for it.

    `changes` maps a round (from 1) to client -> type; ``*`` stands for all clients not named beside
    it. Raises RankError for a round below 1.
    """

    changes: Mapping[int, Mapping[str, str]]

    def __post_init__(self) -> None:
        early = sorted(round for round in self.changes if round < 1)
        if early:
            raise RankError(f"fleet schedule: rounds count from 1, got changes in round {early[0]}")

    @property
    def clients(self) -> set[str]:
        """The clients that it names."""
        return {id for named in self.changes.values() for id in named} - {EVERYONE}

    @property
    def types(self) -> set[str]:
        """The types that it gives."""
        return {name for named in self.changes.values() for name in named.values()}

    def at(self, assigned: Mapping[str, str], round: int) -> Mapping[str, str]:
        """Return client -> type in this round, `assigned` being the types before any change."""
        now = dict(assigned)
        for when in sorted(when for when in self.changes if when <= round):
            named = self.changes[when]
            if EVERYONE in named:
                now = dict.fromkeys(now, named[EVERYONE])
            now |= {id: name for id, name in named.items() if id != EVERYONE}
        return now


@dataclass(frozen=True)
class Redraw:
    """Every `every` rounds the same types are given to the clients anew, at random from `seed`.

    Raises RankError unless `every` is at least 1.
    """

    every: int
    seed: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RankError(f"fleet redraw: expected every 1 round or more, got {self.every}")

    @property
    def clients(self) -> set[str]:
        """The clients that it names: none."""
        return set()

    @property
    def types(self) -> set[str]:
        """The types that it gives: none but those of the clients."""
        return set()

    def at(self, assigned: Mapping[str, str], round: int) -> Mapping[str, str]:
        """Return client -> type in this round, `assigned` being those of the first rounds."""
        period = (max(round, 1) - 1) // self.every
        if period == 0:
            return assigned
        names = [assigned[id] for id in sorted(assigned)]
        random.Random(derive(self.seed, "redraw", period)).shuffle(names)
        return dict(zip(sorted(assigned), names, strict=True))


Schedule = Trace | Redraw
