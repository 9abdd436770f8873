"""A span: the blocks of a model that a machine holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polyrank.errors import ModelError, SiteError
from polyrank.planning.spec import ModelSpec


@dataclass(frozen=True)
class Span:
    """Blocks `first` … `last` − 1, counted from 0; without `last` all that follow.

    The embeddings go with the first block of a model, the final norm and the output embedding with
    its last: a head is ``Span(0, cut)``, a tail ``Span(cut)``, and the client of a U-shape holds
    both ``Span(0, cut)`` and ``Span(upper)``.
    """

    first: int = 0
    last: int | None = None


def blocks_of(spans: Sequence[Span], blocks: int) -> frozenset[int]:
    """Return the indices of the blocks in the spans of a model of so many blocks.

    Raises ModelError if there is no span, or one is empty, reaches beyond the model or overlaps
    with another.
    """
    covered: set[int] = set()
    for span in spans:
        last = blocks if span.last is None else span.last
        if not 0 <= span.first < last <= blocks:
            raise ModelError(
                f"model: expected a span of blocks within 0…{blocks}, got blocks {span.first} up "
                f"to {last}; this model has {blocks} blocks"
            )
        own = set(range(span.first, last))
        if own & covered:
            raise ModelError(f"model: block {min(own & covered)} is in two spans; name it once")
        covered |= own
    if not covered:
        raise ModelError("model: expected at least one span of blocks to hold, got none")
    return frozenset(covered)


def sites_within(spec: ModelSpec, blocks: frozenset[int]) -> ModelSpec:
    """Return the specification with the sites of some blocks only; SiteError if there is none."""
    sites = tuple(site for site in spec.sites if site.block in blocks)
    if not sites:
        raise SiteError(
            f"sites: none of the chosen sites lies in blocks {sorted(blocks)}, there are some in "
            f"{sorted({site.block for site in spec.sites})}; choose sites in every part"
        )
    return replace(spec, sites=sites)
