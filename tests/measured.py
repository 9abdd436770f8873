"""What real training passes keep, for tests of the cost model: measured, never computed."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from polyrank.algebra import Adapter, LowRank
from polyrank.model import Cohort, Cut, LoadedModel, Part, Slot, logits_at


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
) -> int:
    """Return the bytes that one microbatch of a whole client keeps, the logits with them."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    held = Storages()
    with Cohort(model, [slot_for(model, ranks, dropout)]) as cohort:
        cohort.route([Part(0, rows, length, (0, 0))])
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
) -> int:
    """Return the bytes that one microbatch keeps in a cut model's `head`, `middle` or `tail`."""
    cut = Cut(model, lower, upper)
    held = Storages()
    with Cohort(model, [slot_for(model, ranks)]) as cohort:
        cohort.route([Part(0, rows, length, (0, 0))])
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
