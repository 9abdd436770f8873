"""The interval at which importance is measured, from its cost on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from polyrank.algebra import Adapter, LowRank
from polyrank.model import Cohort, LoadedModel, Part, Slot, logits_at, losses_then_gradient
from polyrank.training.scoring import Scoring

SHARE = 0.05
"""The part of the training time that measuring may take."""


def scoring_interval(
    model: LoadedModel,
    metric: str = "channel",
    *,
    ranks: Mapping[str, int] | None = None,
    clients: int = 1,
    rows: int = 2,
    length: int = 64,
    passes: int = 7,
    share: float = SHARE,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return n such that measuring in every n-th step costs at most `share` of the time.

    n = ⌈extra/share⌉ with `extra` of `scoring_cost`. The time of the optimizer is not counted, so
    the true share is a little smaller. A round always measures in its first step: where it has
    fewer than n steps, the share is extra/steps.
    """
    extra = scoring_cost(
        model,
        metric,
        ranks=ranks,
        clients=clients,
        rows=rows,
        length=length,
        passes=passes,
        clock=clock,
    )
    return interval(extra, share)


def interval(extra: float, share: float = SHARE) -> int:
    """Return ⌈extra/share⌉, at least 1."""
    return max(1, math.ceil(extra / share))


def scoring_cost(
    model: LoadedModel,
    metric: str = "channel",
    *,
    ranks: Mapping[str, int] | None = None,
    clients: int = 1,
    rows: int = 2,
    length: int = 64,
    passes: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how much longer a pass forward and back takes that measures, as a part of the other.

    The median over `passes` pairs, which take turns, of passes over random rows of `length` tokens
    (less if the context is shorter), half of them with loss; `clients` of these `ranks` per site (0
    where none is given; None: 8 at all sites) with `rows` each. One pair before them is not
    counted. RecipeError for another metric.
    """
    Scoring(1, metric)
    if ranks is None:
        ranks = {site: min(8, *shape) for site, shape in model.spec.shapes.items()}
    length = min(length, model.spec.context)
    draw = torch.Generator().manual_seed(0)
    words = model.module.get_input_embeddings().weight.shape[0]
    ids = torch.randint(words, (clients * rows, length), generator=draw).to(model.device)
    positions = torch.arange(ids.numel(), device=model.device).view(ids.shape)
    positions = positions[:, length // 2 :].flatten()
    targets = ids.flatten()[positions]
    weights = torch.full(targets.shape, 1.0 / len(targets), device=model.device)
    start = {
        site: LowRank(
            torch.randn(m, ranks.get(site, 0), generator=draw),
            torch.randn(ranks.get(site, 0), n, generator=draw) / n**0.5,
        )
        for site, (m, n) in model.spec.shapes.items()
    }
    slot = Slot(Adapter(start), dict.fromkeys(start, 1.0))
    with Cohort(model, [slot] * clients, scored=True) as cohort:

        def seconds(scored: bool) -> float:
            begun = clock()
            cohort.zero_gradients()
            cohort.route([Part(k, rows, length, scored=scored) for k in range(clients)])
            logits = logits_at(model, ids, positions)
            losses_then_gradient(logits, targets, weights)
            if logits.requires_grad:
                logits.backward(logits.detach())
            for k in range(clients if scored else 0):
                cohort.scores(k, metric)
            if model.device.type != "cpu":
                torch.accelerator.synchronize(model.device)
            return clock() - begun

        seconds(True), seconds(False)
        ratios = []
        for turn in range(passes):
            first = bool(turn % 2)
            taken = {first: seconds(first), (not first): seconds(not first)}
            ratios.append(taken[True] / taken[False])
    return max(0.0, statistics.median(ratios) - 1.0)
