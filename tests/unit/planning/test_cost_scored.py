"""A step that measures importance takes more memory: predicted against what real passes keep."""

from dataclasses import replace

import pytest
import torch

from measured import kept_by_part, kept_by_training, peak_of_training, sized, some_ranks
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.workload import Workload

PROMISED = ["llama", "qwen3", "gemma2", "gpt2"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
WITHIN = 0.02
"""The promise is 10%; see test_cost_memory."""
BATCH = (3, 23, 5)


def costs(model, **options) -> CostModel:
    load = Workload(*BATCH, itemsize=model.dtype.itemsize, scored=True, **options)
    return CostModel(anatomy_of(model), model.spec, load)


def choices(model) -> list[dict[str, int]]:
    """Ranks everywhere, in the upper half alone, here and there, at the last site, nowhere."""
    upper = {site.name: 3 for site in model.spec.sites if site.block >= 2}
    everywhere = dict.fromkeys(model.spec.shapes, 3)
    return [everywhere, upper, some_ranks(model, 1), {[*upper][-1]: 1}, {}]


@DTYPES
@pytest.mark.parametrize("architecture", PROMISED)
def test_a_scored_pass_keeps_every_sites_output_and_goes_down_to_the_first_block(
    architecture, dtype
):
    model = sized(architecture, dtype=dtype)
    for ranks in choices(model):
        predicted = costs(model).memory(ranks, None).activations
        measured = kept_by_training(model, ranks, *BATCH, scored=True)
        assert predicted == pytest.approx(measured, rel=WITHIN)


@DTYPES
@pytest.mark.parametrize("architecture", PROMISED)
@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(3), CutPoint(1, 3)], ids=str)
def test_each_side_of_a_cut_keeps_the_outputs_of_its_own_sites(architecture, dtype, cut):
    model = sized(architecture, dtype=dtype)
    states = 3 * 23 * 48 * dtype.itemsize  # what was sent stays until its gradient comes

    def measured(ranks, *parts):
        where = (*BATCH, cut.lower, cut.upper)
        return sum(kept_by_part(model, ranks, *where, part, scored=True) for part in parts)

    client, server = (("head",), ("tail",))
    if cut.upper is not None:
        client, server = (("head", "tail"), ("middle",))
    # The embedding's hook, which lets a gradient in, belongs to passes of the head alone.
    for ranks in choices(model)[:4]:
        predicted = costs(model, in_flight=1)
        at_client = predicted.memory(ranks, cut).activations - states
        assert at_client == pytest.approx(measured(ranks, *client), rel=WITHIN)
        at_server = predicted.server_memory(ranks, cut).activations
        at_server -= states if cut.upper is not None else 0
        assert at_server == pytest.approx(measured(ranks, *server), rel=WITHIN)


@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("architecture", PROMISED)
def test_the_peak_of_a_scored_step_is_near(architecture, checkpointing, dtype):
    """Within 15%, as without scoring."""
    model = sized(architecture, dtype=dtype, checkpointing=checkpointing)
    for ranks in choices(model)[:3]:
        memory = costs(model, checkpointing=checkpointing).memory(ranks, None)
        predicted = memory.activations + memory.temporary
        measured = peak_of_training(model, ranks, *BATCH, scored=True)
        assert predicted == pytest.approx(measured, rel=0.15)


def test_scoring_changes_memory_alone():
    model = sized("llama")
    ranks = some_ranks(model, 2)
    scored = costs(model)
    plain = CostModel(scored.anatomy, scored.spec, replace(scored.workload, scored=False))
    for cut in (None, CutPoint(2)):
        assert scored.operations(ranks, cut) == plain.operations(ranks, cut)
        assert scored.wire(cut) == plain.wire(cut)
        more, less = scored.memory(ranks, cut), plain.memory(ranks, cut)
        assert more.total > less.total
        assert (more.weights, more.adapters, more.gradients, more.optimizer) == (
            less.weights,
            less.adapters,
            less.gradients,
            less.optimizer,
        )
