"""The number of clients that fit into one pass, from the memory that each of them takes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.model import Cohort, LoadedModel, Part, Slot, logits_at
from polyrank.training.settings import LocalTraining

MOST = 16
"""Larger cohorts gain little: by then the base's own arithmetic fills the machine."""

CPU_TOKENS = 2048
"""Tokens in a pass that fill a CPU: with more, activations leave its caches and nothing is won."""

MARGIN = 1.25
"""For what is left out: temporaries of the backward pass, fragmentation of the memory."""

_COPIES = 4
"""Of a slot's factors, beside the moments: values, gradients, the sent and the returned ones."""

_LENGTHS = (8, 16, 24)
"""Short rows whose activations are measured; bytes are a polynomial of degree 2 in the length."""


def cohort_size(
    model: LoadedModel,
    ranks: Mapping[str, int],
    local: LocalTraining,
    longest: int,
    targets: int,
    available_bytes: int,
    assignments: Sequence[Assignment] = (),
    *,
    scored: bool = False,
) -> int:
    """Return how many clients of these ranks fit into `available_bytes`, at most `MOST`; may be 0.

    `ranks` are those of the largest client, since shorter ones are padded to them, `longest` the
    tokens of the longest example and `targets` the most tokens with loss in one example. With
    `scored` some steps measure importance. On a CPU a pass of more than one client is also bounded
    by `CPU_TOKENS`.
    """
    size = available_bytes // slot_bytes(
        model, ranks, local, longest, targets, assignments, scored=scored
    )
    if model.device.type == "cpu":
        size = min(size, max(1, CPU_TOKENS // (local.batch * longest)))
    return min(MOST, size)


def slot_bytes(
    model: LoadedModel,
    ranks: Mapping[str, int],
    local: LocalTraining,
    longest: int,
    targets: int,
    assignments: Sequence[Assignment] = (),
    *,
    scored: bool = False,
) -> int:
    """Return an estimate of the bytes that one client adds to a pass.

    Its factors with gradients and moments, and the activations of a microbatch of the longest
    examples. These are measured on the model itself, whatever it saves and whichever attention it
    uses: the bytes that autograd keeps in forward passes over three short rows give the polynomial
    in the length. The logits at the targets are counted with them. Under checkpointing it is one
    hidden state a block, and one block's activations by plain arithmetic.

    `assignments` are of the kind that will come: their largest frozen term counts, of a
    sparse start the whole matrix that is made of it, at one site at a time, and dense starts in the
    place of factors. What is merged into the base is not counted: it is there once, not for each
    client. With `scored` the pass measures importance, which keeps the outputs of all sites.
    """
    of_factors = sum(rank * sum(model.spec.shapes[site]) for site, rank in ranks.items())
    entries = max([of_factors, *map(_dense_entries, assignments)])
    itemsize = max(4, model.dtype.itemsize)
    factors = (_COPIES + local.moments + (local.resolved.proximal > 0)) * entries * itemsize
    measured = {length: _kept(model, ranks, local, length, 1, scored) for length in _LENGTHS}
    per_target = _kept(model, ranks, local, _LENGTHS[0], 2, scored) - measured[_LENGTHS[0]]
    row = _extrapolate(measured, longest) + targets * per_target
    if model.checkpointing:
        row += longest * itemsize * _checkpointed(model)
    return int(MARGIN * (factors + itemsize * _beside(assignments) + local.batch * row))


def _dense_entries(assignment: Assignment) -> int:
    """Return the entries that a client trains of dense starts."""
    shapes = [delta.shape for delta in assignment.start.values() if isinstance(delta, Dense)]
    return sum(m * n for m, n in shapes)


def _beside(assignments: Sequence[Assignment]) -> int:
    """Return the numbers that a slot holds beside what it trains.

    A frozen term is in memory twice: in its assignment and in the cohort's stack. Of the
    starts the largest matrix counts, three times: a sparse start becomes a dense matrix, two in
    the backward pass, and has a dense gradient; a dense start needs less, its gradient and the sum
    of its gradients.
    """
    frozen = max(
        (
            sum(d.rank * sum(d.shape) for d in assignment.frozen.values())
            for assignment in assignments
        ),
        default=0,
    )
    starts = [delta for assignment in assignments for delta in assignment.start.values()]
    shapes = [d.shape for d in starts if isinstance(d, Sparse | Dense)]
    whole = max((m * n for m, n in shapes), default=0)
    return 2 * frozen + 3 * whole


def _extrapolate(measured: Mapping[int, int], at: int) -> int:
    """Return the value at `at` of the polynomial through the measured points (Lagrange)."""
    total = 0.0
    for x, value in measured.items():
        term = float(value)
        for other in measured:
            if other != x:
                term *= (at - other) / (x - other)
        total += term
    return max(0, int(total))


def _checkpointed(model: LoadedModel) -> int:
    """Return values per token: the inputs of all blocks, and what the widest block computes."""
    spec = model.spec
    widths = [12 * spec.hidden] * spec.blocks
    for site in spec.sites:
        widths[site.block] += site.m + site.n
    return spec.hidden * spec.blocks + max(widths)


def _kept(
    model: LoadedModel,
    ranks: Mapping[str, int],
    local: LocalTraining,
    length: int,
    targets: int,
    scored: bool = False,
) -> int:
    """Return the bytes that autograd keeps for one row, each storage once, and of its logits."""
    start = Adapter(
        {
            site: LowRank(torch.zeros(m, ranks[site]), torch.zeros(ranks[site], n))
            for site, (m, n) in model.spec.shapes.items()
        }
    )
    saved_tensors: dict[int, Tensor] = {}  # references the tensors, so that no address is reused

    def note(tensor: Tensor) -> Tensor:
        # Without its history: a node that keeps its own output would keep itself alive for good.
        saved_tensors[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return saved_tensors[tensor.untyped_storage().data_ptr()]

    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    positions = torch.arange(targets, device=model.device)
    slot = Slot(start, dict.fromkeys(start, 1.0), dropout=local.dropout)
    with Cohort(model, [slot], scored=scored) as cohort:
        cohort.route([Part(0, 1, length, (0, 0), scored)])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            note(logits_at(model, ids, positions))
        fixed = [*model.module.parameters(), *model.module.buffers(), *cohort.parameters(0)]
    for tensor in fixed:
        saved_tensors.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors.values())


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library holds it back (glibc).

    A round frees all that it allocated, but glibc keeps the pages, in pieces that the next round
    does not fit: the resident memory of a long run would grow although the memory in use does not.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
