"""How many clients fit into one pass."""

import gc
import warnings

import pytest
import torch

from dense_oracle import random_sparse
from models import random_adapter, tiny_loaded
from polyrank.aggregation import Assignment
from polyrank.algebra import Adapter, Dense
from polyrank.training import LocalTraining, cohort_size, slot_bytes
from polyrank.training.capacity import CPU_TOKENS, MOST, _extrapolate, _kept


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_short_rows_tell_exactly_what_a_long_one_keeps(architecture, dropout):
    """Also where attention keeps a square of the length (Gemma 2, Bloom)."""
    model = tiny_loaded(architecture)
    ranks = dict.fromkeys(model.spec.shapes, 2)
    local = LocalTraining(dropout=dropout)
    measured = {n: _kept(model, ranks, local, n, 1) for n in (8, 16, 24)}
    assert _extrapolate(measured, 60) == _kept(model, ranks, local, 60, 1)


def test_a_slot_takes_at_least_its_factors_and_inputs_and_more_with_all_that_grows():
    model = tiny_loaded("llama")

    def size(rank=2, longest=20, targets=5, model=model, **local) -> int:
        ranks = dict.fromkeys(model.spec.shapes, rank)
        return slot_bytes(model, ranks, LocalTraining(**local), longest, targets)

    entries = sum(2 * (m + n) for m, n in model.spec.shapes.values())
    inputs = sum(site.n for site in model.spec.sites if "q_proj" in site.name)
    assert size() > 4 * (4 * entries + 8 * 20 * inputs)
    assert size(rank=4) > size()
    assert size(longest=40) > size()
    assert size(targets=15) > size()
    assert size(batch=16) > size()
    assert size(dropout=0.1) > size()
    assert size(optimizer="sgd") < size()
    assert size(proximal=0.1) - size() == pytest.approx(1.25 * 4 * entries, abs=1), "the start"
    saving = tiny_loaded("llama", checkpointing=True, num_hidden_layers=12)
    plain = tiny_loaded("llama", num_hidden_layers=12)
    assert size(model=saving) < size(model=plain)


def test_what_an_assignment_holds_beside_factors_is_counted():
    model = tiny_loaded("llama")
    ranks = dict.fromkeys(model.spec.shapes, 2)
    factors, few = random_adapter(model, 2), random_sparse(model, 5)
    scale = dict.fromkeys(ranks, 1.0)
    plain = Assignment(factors, scale)
    held = {
        "frozen": Assignment(factors, scale, frozen=random_adapter(model, 3)),
        "sparse": Assignment(few, scale),
    }
    sizes = {
        name: slot_bytes(model, ranks, LocalTraining(), 20, 5, [plain, one])
        for name, one in held.items()
    }
    bare = slot_bytes(model, ranks, LocalTraining(), 20, 5)
    assert slot_bytes(model, ranks, LocalTraining(), 20, 5, [plain]) == bare
    shapes = model.spec.shapes.values()
    frozen = 2 * sum(3 * (m + n) for m, n in shapes)
    whole = 3 * max(m * n for m, n in shapes)
    assert sizes["frozen"] - bare == pytest.approx(1.25 * 4 * frozen, abs=1)
    assert sizes["sparse"] - bare == pytest.approx(1.25 * 4 * whole, abs=1)
    args = (model, ranks, LocalTraining(), 20, 5, 10 * bare)
    assert (cohort_size(*args), cohort_size(*args, [held["frozen"]])) == (10, 9)


def test_dense_starts_count_in_the_place_of_factors():
    model = tiny_loaded("llama")
    ranks, local = dict.fromkeys(model.spec.shapes, 2), LocalTraining()
    whole = Adapter({site: Dense(torch.zeros(shape)) for site, shape in model.spec.shapes.items()})
    assigned = [Assignment(whole, dict.fromkeys(whole, 1.0))]
    shapes = model.spec.shapes.values()
    copies = 4 + 2  # values, gradients, the sent and the returned; AdamW's moments
    more = copies * sum(m * n - 2 * (m + n) for m, n in shapes) + 3 * max(m * n for m, n in shapes)
    bare = slot_bytes(model, ranks, local, 20, 5)
    assert slot_bytes(model, ranks, local, 20, 5, assigned) - bare == pytest.approx(
        1.25 * 4 * more, abs=2
    )


def test_the_cohort_follows_from_memory_up_to_a_bound():
    model = tiny_loaded("llama")
    ranks, local = dict.fromkeys(model.spec.shapes, 2), LocalTraining(batch=2)
    one = slot_bytes(model, ranks, local, 10, 5)

    def size(available: int, longest: int = 10) -> int:
        return cohort_size(model, ranks, local, longest, 5, available)

    assert [size(k * one) for k in (0, 1, 3)] == [0, 1, 3]
    assert size(3 * one - 1) == 2
    assert size(10**15) == MOST
    assert size(10**15, longest=CPU_TOKENS // 6) == 3
    assert size(10**15, longest=CPU_TOKENS) == 1


def test_measuring_leaves_no_trace():
    model = tiny_loaded("llama")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    slot_bytes(model, dict.fromkeys(model.spec.shapes, 2), LocalTraining(), 30, 5)
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())
    assert not any(child._forward_hooks for child in model.module.modules())


def test_measuring_leaves_no_tensor_behind():
    """Autograd can refer to itself where no collector looks; every run measures."""
    model = tiny_loaded("llama", num_hidden_layers=1)
    ranks = dict.fromkeys(model.spec.shapes, 2)

    def alive():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Some modules warn when asked for their class.
            return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    slot_bytes(model, ranks, LocalTraining(), 20, 5)
    before = alive()
    for _ in range(3):
        slot_bytes(model, ranks, LocalTraining(), 20, 5)
    assert alive() <= before
