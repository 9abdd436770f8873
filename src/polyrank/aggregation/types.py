"""The records that pass between a server and its clients in a round."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from polyrank.algebra import Adapter, Delta, Dense, LowRank, Sparse
from polyrank.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

D = TypeVar("D", bound=Delta)

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
    which the server keeps each site. Where ranks change from round to round, `ranks` also has an
    entry for every other set of ranks that may come. `seed` is for what a rule draws before the
    first round.
    """

    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Mapping[str, int]]
    server_rank: Mapping[str, int]
    seed: int


Train = str
"""Which factors of a low-rank start a client trains: a key of `TRAINED`."""

TRAINED: Mapping[Train, tuple[str, ...]] = {"both": ("b", "a"), "b": ("b",)}
"""The factors that are trained, by the name that assignments and messages carry. The others are
fixed: training, updates and their checks leave them alone."""


def fixed(start: Delta, train: Train) -> tuple[str, ...]:
    """Return the names of those tensors of a start that training leaves as they were sent."""
    if isinstance(start, Sparse):
        return ("positions", "shape")
    if isinstance(start, LowRank):
        return tuple(name for name in start.tensors() if name not in TRAINED[train])
    return ()


@dataclass(frozen=True)
class Penalty:
    """A term of the client's loss, per site: strength·‖B[:, keep:]‖_F·‖A[keep:]‖_F.

    B and A are the factors as trained, s divided out; `keep` gives a rank per site.
    """

    strength: float
    keep: Mapping[str, int]


@dataclass(frozen=True)
class SiteAssignment:
    """One site of an assignment: the update to start from, and how it is to be trained.

    `start` is trained: `LowRank` factors, a `Sparse` update whose values alone are trained, or a
    `Dense` one, trained at every entry.
    `frozen` is active and not trained. `penalty` is (strength, keep) of a `Penalty`, if there is
    one.
    """

    start: Delta
    frozen: LowRank | None = None
    train: Train = "both"
    penalty: tuple[float, int] | None = None


@dataclass(frozen=True)
class Assignment:
    """All that a client's training must know; it never asks which rule made it.

    `start` holds what to train, s folded into B: training divides B by ``scale[site]`` and
    multiplies on return, so that gradients are those of LoRA with ΔW = s·B A. A `Sparse` or
    `Dense` start is trained as it is, without a scale. `frozen` is a low-rank term per site and
    `merged` a dense one that are active in the forward pass and not trained (empty if none);
    `merged` is float32 or wider and is the same for all clients of a round, also at sites that a
    client does not train.
    `train` says which factors are trained (`TRAINED`). `penalty` is a term of the loss.
    """

    start: Adapter[Delta]
    scale: Mapping[str, float]
    frozen: Adapter[LowRank] = field(default_factory=lambda: Adapter({}))
    merged: Adapter[Dense] = field(default_factory=lambda: Adapter({}))
    train: Train = "both"
    penalty: Penalty | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """The trained rank per site."""
        return self.start.ranks

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that travel to the client, `merged` apart.

        A fixed A is drawn from a seed, so it does not travel, nor does a frozen term that is the
        negative of the start. What a client downloads of `merged` depends on what it has already:
        `Rule.catch_up`.
        """
        sent = (d.nbytes for s, d in self.frozen.items() if not _opposite(d, self.start.get(s)))
        trained = self.start.values()
        drawn = (d.tensors()["a"].nbytes for d in trained if "a" in fixed(d, self.train))
        return self.start.nbytes - sum(drawn) + sum(sent)

    def travelling(self, trained: Adapter[Delta]) -> int:
        """Return the bytes of an update to this assignment: what was trained, and no more."""
        return sum(
            tensor.nbytes
            for delta in trained.values()
            for name, tensor in delta.tensors().items()
            if name not in fixed(delta, self.train)
        )

    def only(self, sites: Collection[str]) -> Assignment:
        """Return what it says of these sites: the part of one side of a cut."""
        penalty = self.penalty
        if penalty is not None:
            keep = {site: rank for site, rank in penalty.keep.items() if site in sites}
            penalty = replace(penalty, keep=keep) if keep else None
        return replace(
            self,
            start=_only(self.start, sites),
            scale={site: scale for site, scale in self.scale.items() if site in sites},
            frozen=_only(self.frozen, sites),
            merged=_only(self.merged, sites),
            penalty=penalty,
        )

    def hash(self) -> str:
        """Return a SHA-256 (hex) over all that is assigned, bit by bit; made once."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        scales = ";".join(f"{site}={self.scale[site].hex()}" for site in sorted(self.scale))
        text = f"{self.start.hash()}|{self.frozen.hash()}|{scales}"
        if self.merged:
            text += f"|merged {self.merged.digest}"
        if self.train != "both":
            text += f"|train {self.train}"
        if self.penalty is not None:
            keep = ";".join(f"{site}={rank}" for site, rank in sorted(self.penalty.keep.items()))
            text += f"|penalty {self.penalty.strength.hex()} {keep}"
        return hashlib.sha256(text.encode()).hexdigest()


def _only(adapter: Adapter[D], sites: Collection[str]) -> Adapter[D]:
    return Adapter({site: delta for site, delta in adapter.items() if site in sites})


def _opposite(frozen: LowRank, start: Delta | None) -> bool:
    """Whether a frozen term is −B, A of the start, bit by bit."""
    return (
        isinstance(start, LowRank)
        and start.b.dtype == frozen.b.dtype
        and torch.equal(start.a, frozen.a)
        and torch.equal(-start.b, frozen.b)
    )


@dataclass(frozen=True)
class Update:
    """One client's answer to its assignment: what it trained, and what rides along.

    `adapter` has s folded into B, like the assignment's `start`. `assignment` is the hash of the
    assignment that was trained. `examples` is the number of training examples, `metrics` holds
    numbers such as ``loss`` (mean per token over the local steps), ``tokens`` and ``seconds``.
    `importance` is how important the base's matrix is to the client, per site of the model, also
    where it trained nothing; empty if it was not measured.
    """

    client: str
    round: int
    attempt: int
    assignment: str
    examples: int
    adapter: Adapter[Delta]
    metrics: Mapping[str, float] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contribution:
    """One client's part in one site's merge: its weight, what it was sent, what it returned."""

    weight: float
    sent: SiteAssignment
    result: Delta
    client: str = ""


@dataclass(frozen=True)
class SiteReport:
    """What a merge did to one site: energies are squared Frobenius norms.

    `energy` is ‖D‖² of the aggregate before it was cut to the server's rank, `discarded` what the
    cut took away, `method` the factorisation used ("" if none).
    """

    energy: float
    discarded: float
    method: str = ""
