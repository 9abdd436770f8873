import pytest
import torch
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from kit import kit_path
from models import EOS, VOCABULARY, random_adapter, tiny_loaded
from polyrank.algebra import Adapter
from polyrank.errors import DataError, SiteError
from polyrank.model.generation import generate
from polyrank.model.load import load_model


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of([9, 2, 5, 1, 5, 7])


def by_hand(model, adapter, prompt, new):
    """Greedy decoding without cache, batch or hooks: the whole text through W + ΔW every time."""
    state = {}
    for site, delta in (adapter or {}).items():
        layer = model.module.get_submodule(site)
        dense = delta.dense().T if isinstance(layer, Conv1D) else delta.dense()
        state[f"{site}.weight"] = layer.weight + dense
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            out = torch.func.functional_call(
                model.module, state, (torch.tensor([ids]),), {"use_cache": False}
            )
            best, second = out.logits[0, -1].topk(2).values
            assert best - second > 1e-5, "a tie: choose another seed"
            ids.append(int(out.logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
    return model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


# In float32 nothing hangs on rounding here: the best two logits are never within 1e-5.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "phi3", "qwen3", "gpt_neox", "opt", "gemma2", "bloom"]
)
def test_batched_padded_and_cached_equals_one_by_one_without_cache(architecture, dtype):
    # Tied embeddings would make such small models repeat themselves.
    model = tiny_loaded(architecture, dtype=dtype, tie_word_embeddings=False)
    adapter = random_adapter(model, 2)
    texts = generate(model, adapter, PROMPTS, max_new_tokens=6, batch=4)
    assert texts == [by_hand(model, adapter, prompt, 6) for prompt in PROMPTS]
    assert texts != generate(model, None, PROMPTS, max_new_tokens=6, batch=4)


@pytest.mark.kit
def test_a_small_pretrained_model_tells_its_published_story():
    model = load_model(kit_path("models", "stories260K-hf"), device="cpu")
    prompts = [model.tokenizer(text).input_ids for text in ("One day", "Once upon a time")]
    texts = generate(model, None, prompts, max_new_tokens=30)
    assert texts[1].startswith(", there was a little girl named Lily. She loved to play outside")


def test_without_an_adapter_it_is_the_bare_base():
    model = tiny_loaded("llama", dtype=torch.float64)
    texts = generate(model, None, PROMPTS, max_new_tokens=5)
    assert texts == [by_hand(model, None, prompt, 5) for prompt in PROMPTS]


def test_the_batch_size_changes_nothing():
    model = tiny_loaded("llama")
    one = generate(model, None, PROMPTS, max_new_tokens=5, batch=1)
    for batch in (2, 3, 100):
        assert generate(model, None, PROMPTS, max_new_tokens=5, batch=batch) == one


def favouring(token, after=None):
    """Return a model whose next token is always `token`, whatever came before."""
    model = tiny_loaded("gpt_neox", dtype=torch.float64)
    head, norm = model.module.get_output_embeddings(), model.module.gpt_neox.final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        head.weight.zero_()
        head.weight[token] = 1.0
    return model


def test_it_stops_at_the_end_of_sequence_and_leaves_special_tokens_out():
    assert generate(favouring(EOS), None, PROMPTS, max_new_tokens=4) == [""] * len(PROMPTS)
    assert generate(favouring(9), None, PROMPTS, max_new_tokens=3) == ["w9 w9 w9"] * len(PROMPTS)


def test_ends_that_the_model_names_itself_count_as_well():
    model = favouring(9)
    model.module.generation_config.eos_token_id = [9, 11]
    assert generate(model, None, PROMPTS, max_new_tokens=4) == ["w9"] * len(PROMPTS)


def test_the_models_own_settings_have_no_effect_and_stay():
    model = tiny_loaded("llama", dtype=torch.float64)
    plain = generate(model, None, PROMPTS, max_new_tokens=5)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, suppress_tokens=list(range(4, 60))
    )
    model.module.generation_config = own
    before = own.to_dict()
    assert generate(model, None, PROMPTS, max_new_tokens=5) == plain
    assert model.module.generation_config is own
    assert own.to_dict() == before


def test_no_hook_and_no_change_is_left_after_an_error(monkeypatch):
    model = tiny_loaded("llama")
    own = model.module.generation_config

    def broken(**_):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.module, "generate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, random_adapter(model), PROMPTS, max_new_tokens=2)
    assert model.module.generation_config is own
    assert not any(module._forward_hooks for module in model.module.modules())


def test_checkpointing_and_bfloat16_do_not_hinder():
    model = tiny_loaded("llama", dtype=torch.bfloat16, checkpointing=True)
    adapter = random_adapter(model, 2, dtype=torch.float32)
    texts = generate(model, adapter, PROMPTS, max_new_tokens=4)
    assert texts == generate(model, adapter, PROMPTS, max_new_tokens=4)
    assert any(texts)


def test_adapters_may_lack_sites_and_have_any_rank():
    model = tiny_loaded("llama", dtype=torch.float64)
    sites = list(model.spec.shapes)[:3]
    large = random_adapter(model, dict.fromkeys(sites, 40))  # above every matrix: a stacked sum
    texts = generate(model, large, PROMPTS, max_new_tokens=4)
    assert texts == [by_hand(model, large, prompt, 4) for prompt in PROMPTS]


def test_no_prompt_gives_no_text():
    assert generate(tiny_loaded("llama"), None, [], max_new_tokens=4) == []


def test_impossible_requests_are_refused():
    model = tiny_loaded("llama")
    with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
        generate(model, None, [[5], []], max_new_tokens=4)
    with pytest.raises(DataError, match=r"prompt 0 has 61 tokens.*context of 64 less 4"):
        generate(model, None, [[5] * 61], max_new_tokens=4)
    with pytest.raises(DataError, match="at least 1"):
        generate(model, None, [[5]], max_new_tokens=0)
    with pytest.raises(SiteError):
        generate(model, random_adapter(tiny_loaded("gpt2")), [[5]], max_new_tokens=1)
    assert generate(model, Adapter({}), [[5] * 60], max_new_tokens=4)
