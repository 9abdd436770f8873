"""How many clients fit into one pass: an estimate of the memory that each of them takes."""

from __future__ import annotations

from collections.abc import Mapping

from polyrank.model import LoadedModel
from polyrank.training.recipe import LocalTraining

MOST = 16
"""Larger cohorts gain little: by then the base's own arithmetic fills the machine."""

COPIES = 6
"""Of a slot's factors: values, gradients, two moments, the dealt and the returned ones."""


def cohort_size(
    model: LoadedModel,
    ranks: Mapping[str, int],
    local: LocalTraining,
    longest: int,
    targets: int,
    available_bytes: int,
) -> int:
    """Return how many clients of these ranks fit into `available_bytes`, at most `MOST`; may be 0.

    `ranks` are those of the largest client, `longest` the tokens of the longest example and
    `targets` the most tokens with loss in one example.
    """
    return min(MOST, available_bytes // slot_bytes(model, ranks, local, longest, targets))


def slot_bytes(
    model: LoadedModel, ranks: Mapping[str, int], local: LocalTraining, longest: int, targets: int
) -> int:
    """Return an estimate of the bytes that one client adds to a pass.

    Its factors with gradients and moments, and the activations that its backward pass needs: per
    token and block the inputs and outputs of the sites and about twelve hidden states (norms,
    residuals, rotary embeddings, attention), or one hidden state a block and one block's
    activations under checkpointing; and the logits at the targets with their gradient.
    An upper estimate in plain arithmetic, not a measurement: it errs on the side of fewer clients.
    """
    spec, width = model.spec, model.dtype.itemsize
    factors = COPIES * 4 * sum(r * sum(spec.shapes[site]) for site, r in ranks.items())
    tokens = local.batch * longest
    sites = sum(m + n for m, n in spec.shapes.values()) + 4 * sum(ranks.values())
    everything = sites + 12 * spec.hidden * spec.blocks
    if model.checkpointing:
        everything = everything // spec.blocks + spec.hidden * spec.blocks
    logits = 3 * 4 * spec.vocabulary * local.batch * targets
    return factors + tokens * everything * max(width, 4) + logits
