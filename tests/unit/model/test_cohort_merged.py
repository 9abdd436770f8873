"""Dense sums on the base: exact, in every architecture, and gone without a trace."""

import copy

import pytest
import torch
from torch import nn

from dense_oracle import random_merged, random_sparse
from jobs import examples
from models import batch, random_adapter, tiny_loaded
from polyrank.algebra import Adapter, Dense, LowRank
from polyrank.errors import SiteError
from polyrank.model import Cohort, Part, Slot, applied, generate
from polyrank.training import token_losses

ARCHITECTURES = ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "gpt2", "opt", "bloom"]


def slot(model, rank=2, seed=0) -> Slot:
    start = random_adapter(model, rank, seed=seed, dtype=_wide(model))
    return Slot(start, dict.fromkeys(start, 2.0))


def _wide(model) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


def written_into(model, *adapters: Adapter) -> nn.Module:
    """Return a copy of the model with all updates in its weights."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for adapter in adapters:
            for site, delta in adapter.items():
                weight = module.get_submodule(site).weight
                dense = delta.dense()
                weight += dense if weight.shape == dense.shape and not _turned(module) else dense.T
    return module


def _turned(module: nn.Module) -> bool:
    return module.config.model_type == "gpt2"


def parameters(module: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Return per parameter what it is: the object, where it lies, and its bits."""
    return {
        name: (id(p), p.data_ptr(), p.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, p in module.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_sum_acts_for_all_slots_beside_their_own_adapters(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    slots = [slot(model, 2, 0), slot(model, 3, 1)]
    merged = random_merged(model, every=2)
    ids = batch(3, 7)
    with Cohort(model, slots, merged) as cohort:
        cohort.route([Part(1, 1, 7), Part(0, 2, 7)])
        logits = model.module(ids).logits
    for k, rows in ((1, slice(0, 1)), (0, slice(1, 3))):
        dense = written_into(model, merged, slots[k].start)
        torch.testing.assert_close(logits[rows], dense(ids[rows]).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])  # gpt2, bloom: tied embeddings
def test_the_base_has_its_own_parameters_again_on_leaving_bit_by_bit(architecture, dtype):
    model = tiny_loaded(architecture, dtype=dtype)
    before, names = parameters(model.module), [n for n, _ in model.module.named_parameters()]
    merged = random_merged(model)
    with Cohort(model, [slot(model)], merged):
        model.module(batch()).logits.float().sum().backward()
        within = parameters(model.module)
        site = model.spec.sites[0].name + ".weight"
        assert (within[site] == before[site]) == (dtype == torch.bfloat16)
        assert all(within[name] == before[name] for name in before if "embed" in name)
    assert parameters(model.module) == before
    assert [name for name, _ in model.module.named_parameters()] == names
    assert not any(child._forward_hooks for child in model.module.modules())


def test_the_base_is_itself_again_after_an_error_within_and_while_entering():
    model = tiny_loaded("gpt2")
    before = parameters(model.module)

    def fail_inside() -> None:
        with Cohort(model, [slot(model)], random_merged(model)):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert parameters(model.module) == before

    cohort = Cohort(model, [slot(model)], random_merged(model))
    last = model.module.get_submodule(model.spec.sites[-1].name)
    own, last._parameters["weight"] = last._parameters["weight"], None  # as one that is not there
    with pytest.raises(AttributeError):
        cohort.__enter__()
    last._parameters["weight"] = own
    assert parameters(model.module) == before


def test_two_modules_that_share_a_weight_get_each_its_own_sum():
    model = tiny_loaded("llama", dtype=torch.float64)
    first, second = (model.module.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    sites = [s.name for s in model.spec.sites if s.name.endswith("up_proj")]
    merged = random_merged(model)
    merged = Adapter({sites[0]: merged[sites[0]]})
    plain = second(x := torch.randn(2, first.in_features, dtype=torch.float64))
    with applied(model, merged):
        assert torch.equal(second(x), plain)
        expected = x @ (second.weight + merged[sites[0]].matrix).T
        torch.testing.assert_close(first(x), expected, rtol=0, atol=1e-13)
    assert first.weight is second.weight


def test_a_sum_that_bfloat16_would_lose_acts_on_a_bfloat16_base():
    """1e-4 of a weight is below bfloat16's steps of 2^-8: W + M would be W."""
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    site = model.spec.sites[0].name
    child = model.module.get_submodule(site)
    tiny = Dense(1e-4 * child.weight.detach().float())
    assert torch.equal((child.weight + tiny.matrix).bfloat16(), child.weight)
    x = torch.randn(2, 5, child.in_features).bfloat16()
    seen = []
    with Cohort(model, [slot(model)], Adapter({site: tiny})) as cohort:
        layer = cohort._layers[site]
        # what leaves the hook is rounded to bfloat16, so give it an output kept in float32
        seen.append(layer.hook(child, (x,), torch.zeros(2, 5, child.out_features)))
    own = x.float() @ cohort.slots[0].start[site].dense().T
    torch.testing.assert_close(seen[0] - own, x.float() @ tiny.matrix.T, rtol=1e-3, atol=2e-6)


def test_a_dense_adapter_acts_on_a_bfloat16_base_where_nothing_else_does():
    """As in the evaluation of a rule that keeps sums: no slot trains or freezes anything there."""
    model = tiny_loaded("gpt2", dtype=torch.bfloat16)
    site = model.spec.sites[0].name
    child = model.module.get_submodule(site)
    x = torch.randn(2, 5, child.weight.shape[0]).bfloat16()
    whole = random_merged(model)
    expected = (child(x).float() + x.float() @ whole[site].matrix.T).bfloat16()
    with applied(model, whole):
        torch.testing.assert_close(child(x), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_mixture_of_kinds_is_applied_evaluated_and_generated_from(architecture):
    model = tiny_loaded(architecture, dtype=torch.float64)
    factors, few, whole = random_adapter(model, 3), random_sparse(model, 40), random_merged(model)
    names = [*factors]
    mixture = Adapter(
        {names[0]: factors[names[0]], names[1]: few[names[1]], names[2]: whole[names[2]]}
    )
    dense = written_into(model, mixture)
    with applied(model, mixture):
        logits = model.module(batch()).logits
    torch.testing.assert_close(logits, dense(batch()).logits, rtol=0, atol=1e-11)

    as_factors = Adapter(
        {
            s: LowRank(d.dense(), torch.eye(d.shape[1], dtype=torch.float64))
            for s, d in mixture.items()
        }
    )
    rows = examples(5)
    one, other = (token_losses(model, it, rows, 2) for it in (mixture, as_factors))
    assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in other], rel=1e-11)
    prompts = [row.input_ids[:3] for row in rows]
    texts = [generate(model, it, prompts, max_new_tokens=8) for it in (mixture, as_factors, None)]
    assert texts[0] == texts[1] != texts[2]


def test_merged_sums_that_do_not_fit_the_model_are_refused():
    model = tiny_loaded("llama")
    site = model.spec.sites[0].name
    with pytest.raises(SiteError, match="merged at elsewhere, which is not a site"):
        Cohort(model, [slot(model)], Adapter({"elsewhere": Dense(torch.ones(3, 5))}))
    with pytest.raises(SiteError, match=r"merged at .* is \(3, 5\)"):
        Cohort(model, [slot(model)], Adapter({site: Dense(torch.ones(3, 5))}))
    with pytest.raises(SiteError, match="elsewhere"):
        applied(model, Adapter({"elsewhere": Dense(torch.ones(3, 5))}))
