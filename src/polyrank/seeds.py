"""Every random choice of a run comes from a seed derived here, never from a global generator."""

from __future__ import annotations

import hashlib

from polyrank.lazy_torch import torch


def derive(*parts: int | str) -> int:
    """Return a seed in [0, 2⁶³) that depends on every part and on their order.

    Usually ``derive(run, round, attempt, client, purpose)``. Parts are length-prefixed before they
    are hashed (SHA-256), so ``("ab", "c")`` and ``("a", "bc")`` give different seeds, and so do the
    integer 1 and the string "1".
    """
    digest = hashlib.sha256()
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator seeded by `derive` of the parts."""
    return torch.Generator(device=device).manual_seed(derive(*parts))
