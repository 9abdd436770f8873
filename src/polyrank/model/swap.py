"""A dense update added to the weights of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from polyrank.algebra import Adapter, Dense
from polyrank.model.load import LoadedModel


def as_stored(dense: Tensor, module: nn.Module) -> Tensor:
    """Return m×n as the module stores it: n×m in a Conv1D."""
    return dense.T if isinstance(module, Conv1D) else dense


@contextmanager
def with_sums(model: LoadedModel, merged: Adapter[Dense]) -> Iterator[None]:
    """Let the modules at these sites hold W + M, in W's dtype, and their own W again on leaving.

    The base's tensors are not written: each module gets another parameter for the time, and the
    very parameter that it had comes back, also after an error. A module that shares its weight with
    another changes alone. Takes the memory of these weights once more.
    """
    with ExitStack() as back:
        for site, delta in merged.items():
            module = model.module.get_submodule(site)
            own = module.weight
            update = as_stored(delta.matrix.to(device=own.device, dtype=own.dtype), module)
            back.callback(setattr, module, "weight", own)
            module.weight = nn.Parameter(own.detach() + update, requires_grad=False)
        yield
