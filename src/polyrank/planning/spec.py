"""A model as planning knows it: its sites and sizes, never its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One matrix that can be adapted: W is m×n (out × in), in block `block` (from 0).

    `name` is the module's path in the model, e.g. ``model.layers.0.self_attn.q_proj``; `group` is
    ``attention`` or ``feed-forward``.
    """

    name: str
    m: int
    n: int
    block: int
    group: str

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.m, self.n


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model and the sites chosen for adaptation, in the model's own order."""

    architecture: str
    sites: tuple[Site, ...]
    blocks: int
    hidden: int
    vocabulary: int
    context: int
    parameters: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(m, n) per site's name."""
        return {site.name: site.shape for site in self.sites}
