"""What passes between a server and its clients in a round, and what a rule is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from polyrank.algebra import Adapter, LowRank

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class State:
    """All that a rule knows between rounds: tensors and JSON scalars, saved generically.

    Tensors are named ``site/what`` by the rules here. A state is never changed in place: `update`
    returns a new one that shares what did not change.
    """

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Json] = field(default_factory=dict)

    def update(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Json] | None = None
    ) -> State:
        """Return the state with these tensors and scalars replaced or added."""
        return State({**self.tensors, **tensors}, {**self.scalars, **(scalars or {})})


@dataclass(frozen=True)
class FleetSpec:
    """What a rule is told of model and fleet before the first round.

    `shapes` gives (m, n) per site, `ranks` the ranks per client and site, `server_rank` the rank at
    which the server keeps each site. `seed` is for what a rule draws before the first round.
    """

    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Mapping[str, int]]
    server_rank: Mapping[str, int]
    seed: int


@dataclass(frozen=True)
class Dealt:
    """One site of an assignment: the factors to start from and what is active but not trained."""

    start: LowRank
    frozen: LowRank | None = None


@dataclass(frozen=True)
class Assignment:
    """All that a client's training must know; it never asks which rule made it.

    `start` holds the factors to train, s folded into B: training divides B by ``scale[site]`` and
    multiplies on return, so that gradients are those of LoRA with ΔW = s·B A. `frozen` is a
    low-rank term per site that is active in the forward pass and not trained (empty if none).
    """

    start: Adapter
    scale: Mapping[str, float]
    frozen: Adapter = field(default_factory=lambda: Adapter({}))

    @property
    def ranks(self) -> dict[str, int]:
        """The trained rank per site."""
        return self.start.ranks

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel to the client."""
        return self.start.nbytes + self.frozen.nbytes

    def hash(self) -> str:
        """Return a SHA-256 (hex) over factors, frozen terms and scales, bit by bit; made once."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        scales = ";".join(f"{site}={self.scale[site].hex()}" for site in sorted(self.scale))
        text = f"{self.start.hash()}|{self.frozen.hash()}|{scales}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Update:
    """One client's answer to its assignment: the trained factors and what rides along.

    `adapter` has s folded into B, like the assignment's `start`. `assignment` is the hash of the
    assignment that was trained. `examples` is the number of training examples, `metrics` holds
    numbers such as ``loss`` (mean per token over the local steps), ``tokens`` and ``seconds``.
    """

    client: str
    round: int
    attempt: int
    assignment: str
    examples: int
    adapter: Adapter
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel to the server."""
        return self.adapter.nbytes


@dataclass(frozen=True)
class Contribution:
    """One client's part in one site's merge: its weight, what it was dealt, what it returned."""

    weight: float
    dealt: Dealt
    result: LowRank

    def with_weight(self, weight: float) -> Contribution:
        """Return the same contribution under another weight."""
        return replace(self, weight=weight)


@dataclass(frozen=True)
class SiteReport:
    """What a merge did to one site: energies are squared Frobenius norms.

    `energy` is ‖D‖² of the aggregate before it was cut to the server's rank, `discarded` what the
    cut took away, `method` the factorisation used ("" if none).
    """

    energy: float
    discarded: float
    method: str = ""


class Rule(Protocol):
    """How updates become the next state, and the state becomes assignments. Pure."""

    @property
    def name(self) -> str:
        """The name used in recipes and reports, e.g. ``flexlora:delta``."""
        ...

    def init(self, spec: FleetSpec) -> State:
        """Return the state before the first round; RuleError if this fleet cannot be served."""
        ...

    def deal_site(self, state: State, site: str, rank: int, scale: float, seed: int) -> Dealt:
        """Return what a client of this rank and scale gets at one site; deterministic in `seed`."""
        ...

    def merge_site(
        self, state: State, site: str, contributions: Iterator[Contribution]
    ) -> tuple[State, SiteReport]:
        """Return the state with this site aggregated. Weights sum to one; read in order, once."""
        ...

    def adapter(self, state: State) -> Adapter:
        """Return the global adapter at the server's rank, factors ordered by singular value."""
        ...


def deal(
    rule: Rule, state: State, ranks: Mapping[str, int], scale: Mapping[str, float], seed: int
) -> Assignment:
    """Return the assignment of a client with these ranks and scales per site."""
    dealt = {s: rule.deal_site(state, s, ranks[s], scale[s], seed) for s in sorted(ranks)}
    return Assignment(
        start=Adapter({site: one.start for site, one in dealt.items()}),
        scale={site: scale[site] for site in sorted(ranks)},
        frozen=Adapter({s: one.frozen for s, one in dealt.items() if one.frozen is not None}),
    )
