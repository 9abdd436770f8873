"""Predicted operations against torch's own counter, on real training passes."""

import pytest
import torch

from measured import operations_of_parts, operations_of_training, sized, some_ranks
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.workload import Workload

ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
BATCHES = [(1, 6, 3), (3, 11, 4), (2, 23, 9)]


def costs(model, batch, **options) -> CostModel:
    load = Workload(*batch, itemsize=model.dtype.itemsize, **options)
    return CostModel(anatomy_of(model), model.spec, load)


def choices(model):
    top = [site.name for site in model.spec.sites if site.block == 3]
    every = dict.fromkeys(model.spec.shapes, 3)
    return [every, some_ranks(model, 1), some_ranks(model, 2), {top[0]: 2}, {top[-1]: 6}]


def without_fused(predicted: CostModel, ranks, cut=None) -> int:
    """The counter gives the fused attention of CPUs no operations; eager attention it counts."""
    found = predicted.operations(ranks, cut)
    fused = found.attention if predicted.anatomy.attention == "fused" else 0
    return found.client + found.server - fused


@ARCHITECTURES
def test_operations_are_those_that_torch_counts(architecture):
    model = sized(architecture)
    for batch in BATCHES:
        for ranks in choices(model):
            measured = operations_of_training(model, ranks, *batch)
            assert without_fused(costs(model, batch), ranks) == measured


@ARCHITECTURES
def test_checkpointing_computes_forward_again(architecture):
    model, batch = sized(architecture, checkpointing=True), (2, 23, 5)
    for ranks in choices(model)[:3]:
        measured = operations_of_training(model, ranks, *batch)
        predicted = without_fused(costs(model, batch, checkpointing=True), ranks)
        # Of a block's last factors, the product with B is not computed again.
        assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_each_side_of_a_cut_computes_its_part(cut):
    model, batch = sized("gemma2"), (2, 11, 4)  # eager: all of its attention is counted
    for ranks in choices(model):
        found = costs(model, batch, accumulation=3).operations(ranks, CutPoint(cut))
        measured = operations_of_parts(model, ranks, *batch, cut)
        assert (found.client, found.server) == (3 * measured[0], 3 * measured[1])


def test_the_sides_of_a_u_shape_do_together_what_two_sides_do():
    model, batch = sized("qwen3"), (2, 11, 4)
    ranks = dict.fromkeys(model.spec.shapes, 2)
    two = costs(model, batch).operations(ranks, CutPoint(1))
    three = costs(model, batch).operations(ranks, CutPoint(1, 3))
    assert two.client + two.server == three.client + three.server
    assert two.client < three.client


def test_fused_attention_takes_half_the_pairs_and_forms_the_scores_again():
    """Against the counter on the same model with eager attention: 2 products, then 4 more.

    The causal kernel computes T(T+1)/2 of the T² pairs, and 5 products in its backward pass.
    """
    rows, length = batch = 2, 23
    fused, eager = (
        sized("llama", attn_implementation=kind, dtype=torch.float32) for kind in ("sdpa", "eager")
    )
    ranks = dict.fromkeys(fused.spec.shapes, 2)
    whole = operations_of_training(eager, ranks, *batch, 5)
    rest = operations_of_training(fused, ranks, *batch, 5)
    attention = costs(fused, (rows, length, 5)).operations(ranks, None).attention
    share = (length * (length + 1) / 2) / length**2 * (2 + 5) / (2 + 4)
    assert attention == pytest.approx((whole - rest) * share, rel=1e-6)
