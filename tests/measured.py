"""What real training passes keep, for tests of the cost model: measured, never computed."""

import random
from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import tiny_loaded
from polyrank.algebra import Adapter, LowRank
from polyrank.model import Cohort, Cut, LoadedModel, Part, Slot, logits_at, losses_then_gradient

_WIDE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4}
_SLIDING = {
    "head_dim": 12,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SIZES = {
    "llama": _WIDE,
    "qwen3": {**_WIDE, "head_dim": 12},
    "gemma2": {**_WIDE, **_SLIDING},
    "gemma3": {**_WIDE, **_SLIDING},
    "mistral": {**_WIDE, "sliding_window": 16},
    "phi3": _WIDE,
    "gpt_neox": _WIDE,
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 4},
}
"""Sizes of which no two are alike, and in which activations are more than odds and ends."""


def sized(architecture: str, **options: object) -> LoadedModel:
    """Return a random model of four blocks."""
    return tiny_loaded(architecture, **SIZES[architecture], **options)


def some_ranks(model: LoadedModel, seed: int) -> dict[str, int]:
    """Return ranks of 0, 2 and 5 at random, at least one of them not 0."""
    source = random.Random(seed)
    ranks = {site: source.choice([0, 0, 2, 5]) for site in model.spec.shapes}
    return ranks | {source.choice(sorted(ranks)): 4}


class Storages:
    """Storages, each once, held so that no address is used twice."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        self._held.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    def remove(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._held.pop(tensor.untyped_storage().data_ptr(), None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._held.values())


@contextmanager
def noting(held: Storages):
    """Put into `held` all that autograd keeps; without its history, which would keep itself."""

    def note(tensor: Tensor) -> Tensor:
        held.add(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield


def slot_for(model: LoadedModel, ranks: Mapping[str, int], dropout: float = 0.0) -> Slot:
    """Return a place with random factors of these ranks, and of rank 0 elsewhere."""
    start = Adapter(
        {
            site: LowRank(torch.randn(m, ranks.get(site, 0)), torch.randn(ranks.get(site, 0), n))
            for site, (m, n) in model.spec.shapes.items()
        }
    )
    return Slot(start, dict.fromkeys(start, 1.0), dropout=dropout)


def targets_of(rows: int, length: int, targets: int) -> Tensor:
    """Return the places of the first `targets` tokens of each row in rows×length."""
    return (torch.arange(rows)[:, None] * length + torch.arange(targets)).flatten()


def kept_by_training(
    model: LoadedModel,
    ranks: Mapping[str, int],
    rows: int,
    length: int,
    targets: int,
    dropout: float = 0.0,
    scored: bool = False,
) -> int:
    """Return the bytes that one microbatch of a whole client keeps, the logits with them."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    held = Storages()
    with Cohort(model, [slot_for(model, ranks, dropout)], scored=scored) as cohort:
        cohort.route([Part(0, rows, length, (0, 0), scored)])
        with noting(held):
            held.add(logits_at(model, ids, targets_of(rows, length, targets)))
        held.remove([*model.module.parameters(), *model.module.buffers()])
        held.remove(cohort.parameters(0))
    return held.nbytes


def kept_by_part(
    model: LoadedModel,
    ranks: Mapping[str, int],
    rows: int,
    length: int,
    targets: int,
    lower: int,
    upper: int | None,
    part: str,
    scored: bool = False,
) -> int:
    """Return the bytes that one microbatch keeps in a cut model's `head`, `middle` or `tail`."""
    cut = Cut(model, lower, upper)
    held = Storages()
    with Cohort(model, [slot_for(model, ranks)], scored=scored) as cohort:
        cohort.route([Part(0, rows, length, (0, 0), scored)])
        ids = torch.zeros(rows, length, dtype=torch.long)
        with torch.no_grad():
            hidden = cut.head(ids)
        hidden = hidden.detach().requires_grad_()
        with noting(held):
            if part == "head":
                cut.head(ids)
            elif part == "middle":
                cut.middle(hidden)
            else:
                held.add(cut.tail(hidden, targets_of(rows, length, targets)))
        held.remove([*model.module.parameters(), *model.module.buffers()])
        held.remove(cohort.parameters(0))
    return held.nbytes


class Live(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, as an allocator would."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages = {t.untyped_storage()._cdata: (_weakly(t), 0) for t in known}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._storages or self._storages[key][0].expired():
                    self._storages[key] = (_weakly(tensor), tensor.untyped_storage().nbytes())
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:
            del self._storages[key]
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._storages.values()))
        return out


def _weakly(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def peak_of_training(
    model: LoadedModel,
    ranks: Mapping[str, int],
    rows: int,
    length: int,
    targets: int,
    scored: bool = False,
) -> int:
    """Return the most bytes that a microbatch of a whole client takes, forward, loss and back."""
    with Cohort(model, [slot_for(model, ranks)], scored=scored) as cohort:
        own = cohort.parameters(0)
        known = [*model.module.parameters(), *model.module.buffers(), *own, *(p.grad for p in own)]
        ids = torch.zeros(rows, length, dtype=torch.long)
        wanted, share = torch.zeros(rows * targets, dtype=torch.long), torch.ones(rows * targets)
        cohort.route([Part(0, rows, length, (0, 0), scored)])
        with Live(known) as live:
            logits = logits_at(model, ids, targets_of(rows, length, targets))
            losses_then_gradient(logits, wanted, share)
            logits.backward(logits.detach())
    return live.peak


def operations_of_training(
    model: LoadedModel, ranks: Mapping[str, int], rows: int, length: int, targets: int
) -> int:
    """Return the operations of a microbatch, forward and back, as torch's own counter has them.

    It gives no operations to the fused attention of CPUs.
    """
    ids = torch.zeros(rows, length, dtype=torch.long)
    with Cohort(model, [slot_for(model, ranks)]) as cohort:
        cohort.route([Part(0, rows, length, (0, 0))])
        with FlopCounterMode(display=False) as counter:
            logits = logits_at(model, ids, targets_of(rows, length, targets))
            logits.backward(torch.ones_like(logits))
    return counter.get_total_flops()


def operations_of_parts(
    model: LoadedModel, ranks: Mapping[str, int], rows: int, length: int, targets: int, lower: int
) -> tuple[int, int]:
    """Return the operations of a cut client's microbatch: of the head and of the tail."""
    ids, cut = torch.zeros(rows, length, dtype=torch.long), Cut(model, lower)
    with Cohort(model, [slot_for(model, ranks)]) as cohort:
        cohort.route([Part(0, rows, length, (0, 0))])
        with FlopCounterMode(display=False) as head:
            out = cut.head(ids)
            if out.requires_grad:
                out.backward(torch.ones_like(out))
        hidden, wanted = out.detach().requires_grad_(), targets_of(rows, length, targets)
        cut.tail(hidden, wanted)  # A cut looks at a block once, in its first pass.
        with FlopCounterMode(display=False) as tail:
            logits = cut.tail(hidden, wanted)
            logits.backward(torch.ones_like(logits))
    return head.get_total_flops(), tail.get_total_flops()
