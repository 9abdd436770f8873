"""Checks that every rule makes: of a fleet, of ranks and scales, and of updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from polyrank.aggregation.types import Contribution, FleetSpec
from polyrank.algebra import Delta, LowRank
from polyrank.errors import RankError, RuleError, SiteError, UpdateError
from polyrank.lazy_torch import torch


def checked_fleet(rule: str, spec: FleetSpec) -> None:
    """Refuse ranks that no matrix can hold and sites that the model lacks.

    Raises SiteError for an unknown site or one without a server rank, RankError for a rank outside
    1…min(m, n), naming site and client.
    """
    for site in spec.shapes:
        if site not in spec.server_rank:
            raise SiteError(f"{rule}: site {site!r} has no server rank; give it one")
    holders = {"the server": spec.server_rank} | {f"client {c!r}": r for c, r in spec.ranks.items()}
    for holder, ranks in holders.items():
        for site, rank in ranks.items():
            if site not in spec.shapes:
                raise SiteError(
                    f"{rule}: {holder} has a rank for {site!r}, which is not among the "
                    f"{len(spec.shapes)} adapted sites"
                )
            checked_rank(rule, site, rank, spec.shapes[site])


def checked_rank(rule: str, site: str, rank: int, shape: tuple[int, int]) -> None:
    """Raise RankError if `rank` is outside 1…min(m, n)."""
    if not 1 <= rank <= min(shape):
        raise RankError(
            f"{rule}: rank {rank} at {site!r}; expected 1…{min(shape)} for a matrix of "
            f"{shape[0]}×{shape[1]}"
        )


def checked_scale(rule: str, site: str, scale: float) -> None:
    """Raise RuleError unless `scale` is finite and positive."""
    if not (math.isfinite(scale) and scale > 0):
        raise RuleError(f"{rule}: scale {scale} at {site!r}; expected α/r or α/√r, above zero")


@dataclass(frozen=True)
class Change:
    """A checked contribution of low-rank factors: from `start`, as sent, to `result`."""

    client: str
    weight: float
    start: LowRank
    result: LowRank


def weighed(
    rule: str, site: str, contributions: Iterator[Contribution]
) -> Iterator[tuple[str, Contribution]]:
    """Yield the contributions one by one, each with its place for messages, its weight checked.

    Raises RuleError for a weight that is negative or not finite, for no contribution, and at the
    end if the weights do not sum to one.
    """
    weights = []
    for index, contribution in enumerate(contributions):
        place = f"{rule}: contribution {index} at {site!r}"
        if not (math.isfinite(contribution.weight) and contribution.weight >= 0):
            raise RuleError(f"{place} has weight {contribution.weight}; expected a finite one ≥ 0")
        weights.append(contribution.weight)
        yield place, contribution
    if not weights:
        raise RuleError(f"{rule}: no contribution at {site!r}; a merge needs at least one")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise RuleError(
            f"{rule}: the weights at {site!r} sum to {math.fsum(weights)}; expected 1, as from "
            "polyrank.aggregation.normalised"
        )


def checked_finite(place: str, result: Delta) -> None:
    """Raise UpdateError if an update has entries that are NaN or infinite."""
    if not result.is_finite():
        raise UpdateError(
            f"{place} has entries that are NaN or infinite; leave the update out, or lower the "
            "learning rate or the clip norm"
        )


def incoming(
    rule: str, site: str, shape: tuple[int, int], contributions: Iterator[Contribution]
) -> Iterator[Change]:
    """Yield the contributions of factors one by one, checked, in one dtype of at least float32.

    Those of weight zero are left out.

    Raises what `weighed` raises; UpdateError for what is no pair of factors, for another shape or
    rank than was sent, or entries that are NaN or infinite. Messages name site and position.
    """
    for place, contribution in weighed(rule, site, contributions):
        start, result = contribution.sent.start, contribution.result
        if not isinstance(start, LowRank) or not isinstance(result, LowRank):
            raise UpdateError(
                f"{place}: expected low-rank factors, sent were {type(start).__name__}, got "
                f"{type(result).__name__}"
            )
        if result.shape != shape or result.rank != start.rank:
            raise UpdateError(
                f"{place} is of {result.shape} and rank {result.rank}; sent were "
                f"{shape} and rank {start.rank}; nothing is broadcast or cut"
            )
        checked_finite(place, result)
        if contribution.weight > 0:
            yield _widened(contribution.client, contribution.weight, start, result)


def _widened(client: str, weight: float, start: LowRank, result: LowRank) -> Change:
    """Bring start and result to a common dtype, exactly, to be compared and scaled."""
    widest = torch.promote_types(torch.promote_types(start.b.dtype, result.b.dtype), torch.float32)
    return Change(client, weight, start.to(dtype=widest), result.to(dtype=widest))
