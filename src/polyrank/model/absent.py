"""Standing in for modules whose weights are not on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.model.sites import Blocks


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else while the context is entered."""
    before = vars(module).get("forward")  # Set where the module is checkpointed, say.
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def outside(module: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """Return, by path, what has parameters of its own beside the blocks: embeddings, norms, head.

    Modules around the blocks are not among them.
    """
    return {
        name: child
        for name, child in module.named_modules()
        if not f"{name}.".startswith(f"{blocks.prefix}.")
        and not f"{blocks.prefix}.".startswith(f"{name}.")
        and next(child.parameters(recurse=False), None) is not None
    }


def without_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return those of the modules whose own parameters lie on the meta device."""
    return {
        name: child
        for name, child in modules.items()
        if any(parameter.is_meta for parameter in child.parameters(recurse=False))
    }


@contextmanager
def as_zeros(modules: Mapping[str, nn.Module], called: Callable[[str], None]) -> Iterator[None]:
    """Let modules on the meta device give zeros of the shape that they would give.

    Their own forward computes the shape on the meta device, where nothing is read. `called` hears
    of every call, by the module's path, and may refuse it.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(replaced_forward(module, _zeros(name, module.forward, called)))
        yield


def _zeros(
    name: str, forward: Callable[..., Any], called: Callable[[str], None]
) -> Callable[..., Any]:
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        called(name)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        moved = [_to_meta(value) for value in args]
        out = forward(*moved, **{key: _to_meta(value) for key, value in kwargs.items()})
        return torch.zeros_like(out, device=given.device)

    return stand_in


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
