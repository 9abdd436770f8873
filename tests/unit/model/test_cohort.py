"""The cohort's LoRA layers: what they compute, what they refuse, and what they leave alone."""

import copy
import dataclasses
import hashlib

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from jobs import by_group
from models import batch, random_adapter, tiny_loaded
from polyrank.algebra import Adapter, LowRank
from polyrank.errors import RankError, SiteError
from polyrank.model import Cohort, LoadedModel, Part, Slot
from polyrank.model.dropout import keep_mask

ARCHITECTURES = ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "opt", "bloom"]


def slot(model: LoadedModel, ranks=2, *, seed=0, scale=2.0, frozen=0, **rest) -> Slot:
    start = random_adapter(model, ranks, seed=seed)
    fixed = random_adapter(model, frozen, seed=seed + 99) if frozen else Adapter({})
    return Slot(start, dict.fromkeys(start, scale), fixed, **rest)


def written_into(model: LoadedModel, *adapters: Adapter) -> torch.nn.Module:
    """Return a copy of the model with W + Σ BA in the place of W: the dense oracle."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for adapter in adapters:
            for site, delta in adapter.items():
                child = module.get_submodule(site)
                dense = delta.dense()
                child.weight += dense.T if isinstance(child, Conv1D) else dense
    return module


def fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hooks(module: torch.nn.Module) -> int:
    return sum(
        len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_slot_sees_its_own_adapter_and_frozen_term(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    slots = [
        slot(model, by_group(model, 1, 4), seed=1),
        slot(model, 3, seed=2, scale=0.25, frozen=2),
        slot(model, 2, seed=3),
    ]
    ids = batch(6, 7)
    with Cohort(model, slots) as cohort:
        cohort.route([Part(2, 2, 7), Part(0, 1, 5), Part(1, 3, 7)])  # uneven, in another order
        logits = model.module(ids).logits
    for k, rows in ((2, slice(0, 2)), (0, slice(2, 3)), (1, slice(3, 6))):
        dense = written_into(model, slots[k].start, slots[k].frozen)
        torch.testing.assert_close(logits[rows], dense(ids[rows]).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cohort_of_one_takes_any_shape_without_routing(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    one = slot(model, 3, frozen=1)
    with Cohort(model, [one]):
        found = [model.module(batch(rows, length)).logits for rows, length in ((1, 3), (5, 8))]
    dense = written_into(model, one.start, one.frozen)
    for logits, (rows, length) in zip(found, ((1, 3), (5, 8)), strict=True):
        torch.testing.assert_close(logits, dense(batch(rows, length)).logits, rtol=0, atol=1e-11)


def test_what_was_sent_is_what_is_trained_bit_by_bit():
    model = tiny_loaded("gpt2", dtype=torch.float32)
    slots = [slot(model, by_group(model, 1, 4), scale=0.5), slot(model, 3, seed=1, scale=16.0)]
    cohort = Cohort(model, slots)
    for k, one in enumerate(slots):  # scales are powers of two: dividing and multiplying is exact
        assert cohort.adapter(k).hash() == one.start.hash()


def test_a_scale_that_rounds_comes_back_within_one_rounding():
    model = tiny_loaded("llama", dtype=torch.float32)
    one = slot(model, 3, scale=0.3)
    back = Cohort(model, [one]).adapter(0)
    for site, delta in one.start.items():
        assert torch.equal(back[site].a, delta.a)
        torch.testing.assert_close(back[site].b, delta.b, rtol=2e-7, atol=0)


def test_a_returned_adapter_does_not_change_with_further_training():
    model = tiny_loaded("llama")
    cohort = Cohort(model, [slot(model, 2)])
    before = cohort.adapter(0)
    kept = before.hash()
    for parameter in cohort.parameters(0):
        parameter.data.add_(1.0)
    assert before.hash() == kept
    assert cohort.adapter(0).hash() != kept


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padded_ranks_and_slots_without_rows_get_gradients_of_exactly_zero(architecture):
    model = tiny_loaded(architecture)
    slots = [slot(model, rank, seed=rank, frozen=rank) for rank in (1, 4, 2)]
    with Cohort(model, slots) as cohort:
        cohort.route([Part(0, 2, 7), Part(1, 1, 7)])
        model.module(batch(3, 7)).logits.square().sum().backward()
        gradients = [[p.grad.clone() for p in cohort.parameters(k)] for k in range(3)]
    wide = [sum(model.spec.shapes[s][i] for s in model.spec.shapes) for i in (1, 0)]
    for k, rank in ((0, 1), (1, 4)):
        for gradient, per_rank in zip(gradients[k], wide, strict=True):
            assert gradient.count_nonzero() == rank * per_rank
            assert len(gradient) == 4 * per_rank
    assert all(gradient.count_nonzero() == 0 for gradient in gradients[2])


def test_gradients_add_up_over_passes_until_they_are_zeroed():
    model = tiny_loaded("llama", dtype=torch.float64)
    with Cohort(model, [slot(model, 2)]) as cohort:
        a, b = cohort.parameters(0)
        model.module(batch()).logits.square().sum().backward()
        once = [a.grad.clone(), b.grad.clone()]
        model.module(batch()).logits.square().sum().backward()
        torch.testing.assert_close([a.grad, b.grad], [2 * g for g in once])
        cohort.zero_gradients()
        assert a.grad.count_nonzero() == b.grad.count_nonzero() == 0


def test_the_base_stays_as_it_was_bit_by_bit_and_without_gradients():
    model = tiny_loaded("gpt2")
    before = fingerprint(model.module)
    with Cohort(model, [slot(model, 2), slot(model, 1)]) as cohort:
        cohort.route([Part(0, 1, 7), Part(1, 2, 7)])
        model.module(batch()).logits.sum().backward()
    assert fingerprint(model.module) == before
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_hooks_go_with_the_context_also_when_it_ends_in_an_error():
    model = tiny_loaded("llama")
    bare = model.module(batch()).logits
    before = hooks(model.module)

    def fail_inside() -> None:
        with Cohort(model, [slot(model)]):
            assert hooks(model.module) == before + len(model.spec.sites)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert hooks(model.module) == before
    assert torch.equal(model.module(batch()).logits, bare)


def test_a_site_that_cannot_be_hooked_leaves_no_hooks_behind():
    model = tiny_loaded("llama")
    first, *others, last = model.spec.sites
    sites = (first, *others, dataclasses.replace(last, name="model.nowhere"))
    broken = dataclasses.replace(model, spec=dataclasses.replace(model.spec, sites=sites))
    cohort = Cohort(broken, [slot(broken)])
    with pytest.raises(AttributeError):
        cohort.__enter__()
    assert hooks(model.module) == 0


def test_a_cohort_can_be_entered_again():
    model = tiny_loaded("llama", dtype=torch.float64)
    cohort = Cohort(model, [slot(model)])
    found = []
    for _ in range(2):
        with cohort:
            found.append(model.module(batch()).logits)
    assert torch.equal(*found)


def test_a_bfloat16_base_gets_float32_adapters_and_keeps_its_output_dtype():
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    one = slot(model, 3)
    site = model.spec.sites[0].name
    child = model.module.get_submodule(site)
    x = torch.randn(2, 5, child.in_features).bfloat16()
    plain = child(x)
    with Cohort(model, [one]) as cohort:
        y = child(x)
        assert {p.dtype for p in cohort.parameters(0)} == {torch.float32}
    # as peft: x raised to float32, the sum rounded once
    start = one.start[site].to(dtype=torch.float32)
    expected = (plain.float() + (x.float() @ start.a.T) @ start.b.T).bfloat16()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=0)
    assert not torch.equal(y, plain)


def test_a_site_of_rank_zero_is_left_alone():
    model = tiny_loaded("llama", dtype=torch.float64)
    ranks = by_group(model, 0, 2)
    one = slot(model, ranks)
    with Cohort(model, [one]) as cohort:
        logits = model.module(batch()).logits
        assert cohort.adapter(0).ranks == ranks
    dense = written_into(model, one.start)
    torch.testing.assert_close(logits, dense(batch()).logits, rtol=0, atol=1e-11)


def test_a_missing_an_extra_and_a_misshapen_site_are_errors():
    model = tiny_loaded("llama")
    good = slot(model, 2)
    name = next(iter(good.start))
    short = Adapter({s: d for s, d in good.start.items() if s != name})
    for start, scale in (
        (short, good.scale),
        (Adapter({**good.start, "lm_head": good.start[name]}), good.scale),
        (good.start, {**good.scale, "lm_head": 1.0}),
        (good.start, dict.fromkeys(short, 1.0)),
    ):
        with pytest.raises(SiteError, match=r"exactly the model's .* sites"):
            Cohort(model, [good, Slot(start, scale)])
    turned = LowRank(good.start[name].a.T, good.start[name].b.T)
    wide = LowRank(torch.ones(3, 1), torch.ones(1, 5))
    for delta in (turned, wide):
        if delta.shape == good.start[name].shape:
            continue
        with pytest.raises(SiteError, match="slot 0 of 1: start at"):
            Cohort(model, [Slot(Adapter({**good.start, name: delta}), good.scale)])
    with pytest.raises(SiteError, match="frozen at"):
        Cohort(model, [Slot(good.start, good.scale, Adapter({name: wide}))])
    with pytest.raises(SiteError, match="frozen terms at"):
        Cohort(model, [Slot(good.start, good.scale, Adapter({"elsewhere": wide}))])


def test_impossible_ranks_scales_and_dropouts_are_errors():
    model = tiny_loaded("llama")
    good = slot(model, 2)
    name = next(iter(good.start))
    m, n = good.start[name].shape
    over = LowRank(torch.zeros(m, 99), torch.zeros(99, n))
    with pytest.raises(RankError, match="rank 99"):
        Cohort(model, [Slot(Adapter({**good.start, name: over}), good.scale)])
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(SiteError, match="finite and not 0"):
            Cohort(model, [Slot(good.start, {**good.scale, name: scale})])
    with pytest.raises(SiteError, match="dropout"):
        Cohort(model, [dataclasses.replace(good, dropout=1.0)])
    with pytest.raises(SiteError, match="at least one slot"):
        Cohort(model, [])


def test_several_slots_need_routing_and_routing_needs_slots_with_rows():
    model = tiny_loaded("llama")
    with Cohort(model, [slot(model), slot(model)]) as cohort:
        with pytest.raises(SiteError, match="before `route`"):
            model.module(batch())
        for parts in ([], [Part(2, 1, 7)], [Part(0, 1, 7), Part(0, 1, 7)], [Part(-1, 1, 7)]):
            with pytest.raises(SiteError, match=r"0…1 once"):
                cohort.route(parts)
        with pytest.raises(SiteError, match="without rows"):
            cohort.route([Part(0, 0, 7)])


@pytest.mark.parametrize("rows", [2, 4])
def test_a_site_called_with_other_rows_than_the_batch_is_refused_with_the_reason(rows):
    """What an expert of a mixture does: it sees the tokens that were routed to it."""
    model = tiny_loaded("llama")
    site = model.spec.sites[0]
    with Cohort(model, [slot(model), slot(model)]) as cohort:
        cohort.route([Part(0, 1, 7), Part(1, 2, 7)])
        child = model.module.get_submodule(site.name)
        with pytest.raises(SiteError, match="expert of a mixture"):
            child(torch.zeros(rows, 7, site.n))
        with pytest.raises(SiteError, match="expert of a mixture"):
            child(torch.zeros(rows * 5, site.n))


def test_dropout_masks_depend_on_seed_step_microbatch_and_site_alone():
    like = torch.zeros(1)
    first = keep_mask(1, (0, 0), "q", (2, 5, 8), 0.5, like)
    assert torch.equal(first, keep_mask(1, (0, 0), "q", (2, 5, 8), 0.5, like))
    for seed, draw, site in (
        (2, (0, 0), "q"),
        (1, (1, 0), "q"),
        (1, (0, 1), "q"),
        (1, (0, 0), "k"),
    ):
        assert not torch.equal(first, keep_mask(seed, draw, site, (2, 5, 8), 0.5, like))
    many = keep_mask(1, (0, 0), "q", (50, 40, 20), 0.2, like)
    assert set(many.unique().tolist()) == {0.0, 1.25}
    # 40,000 draws: three standard errors of their mean are 3·√(0.2·0.8/40000)·1.25 = 0.0075
    assert abs(many.mean().item() - 1.0) < 0.0075


def test_dropout_is_off_unless_a_part_asks_for_a_draw():
    model = tiny_loaded("llama", dtype=torch.float64)
    one = slot(model, 3, dropout=0.5, seed=7)
    ids = batch(2, 7)
    with Cohort(model, [one]) as cohort:
        bare = model.module(ids).logits
        cohort.route([Part(0, 2, 7)])
        assert torch.equal(model.module(ids).logits, bare)
        cohort.route([Part(0, 2, 7, (0, 0))])
        assert not torch.allclose(model.module(ids).logits, bare)
