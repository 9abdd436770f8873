"""torch, imported when it is first used.

Importing torch takes seconds. Code that is read before anything is computed, such as the rules that
a recipe may name, takes it from here: ``from polyrank.lazy_torch import torch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class _LazyTorch:
    """Stands for the module: looks up every attribute in it."""

    def __getattr__(self, name: str) -> Any:
        import torch as module

        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyTorch()
