"""A model that is cut computes what the whole one does, whatever its architecture."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import VOCABULARY, batch, random_adapter, tiny_loaded
from polyrank.algebra import Adapter
from polyrank.errors import ModelError, SiteError
from polyrank.model import Cohort, Cut, LoadedModel, Part, Slot, Span, logits_at, side

BLOCKS = 4
LENGTHS = (9, 6, 4)
"""Longer than the sliding windows of four tokens."""

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
)
DEEPER = {"gpt2": {"n_layer": BLOCKS}, "bloom": {"n_layer": BLOCKS}}
WINDOWS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2)}}
CUTS = ((1, None), (2, None), (3, None), (1, 2), (1, 3), (2, 3))


def deep(architecture: str, checkpointing: bool = False, **changes: object) -> LoadedModel:
    sizes = DEEPER.get(architecture, {"num_hidden_layers": BLOCKS})
    return tiny_loaded(
        architecture,
        dtype=torch.float64,
        checkpointing=checkpointing,
        **{**sizes, **WINDOWS.get(architecture, {}), **changes},
    )


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids of unequal rows padded on the right, positions with a target, and targets."""
    ids = batch(len(LENGTHS), max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = 0
    steps = [
        (row * max(LENGTHS) + t, int(ids[row, t + 1]))
        for row, length in enumerate(LENGTHS)
        for t in range(length - 1)
    ]
    positions, targets = zip(*steps, strict=True)
    return ids, torch.tensor(positions), torch.tensor(targets)


def slots(model: LoadedModel) -> list[Slot]:
    return [
        Slot(random_adapter(model, rank, seed=rank), dict.fromkeys(model.spec.shapes, 2.0))
        for rank in (2, 3)
    ]


def cohort(model: LoadedModel, only: LoadedModel | None = None) -> Cohort:
    """Two clients, the second with one row more; with `only` just the sites of that side."""
    starts = slots(model)
    if only is not None:
        starts = [
            Slot(
                Adapter({s: slot.start[s] for s in only.spec.shapes}),
                {s: slot.scale[s] for s in only.spec.shapes},
            )
            for slot in starts
        ]
    return Cohort(only or model, starts)


def route(cohort: Cohort) -> None:
    cohort.route([Part(0, 1, LENGTHS[0]), Part(1, 2, LENGTHS[1])])


def stepped(cohorts: list[Cohort]) -> list[dict[str, Tensor]]:
    """Return both slots' products per site after a step of plain descent on their gradients."""
    found: list[dict[str, Tensor]] = []
    for k in range(2):
        products: dict[str, Tensor] = {}
        for member in cohorts:
            with torch.no_grad():
                for parameter in member.parameters(k):
                    parameter -= parameter.grad
            adapter = member.adapter(k)
            products |= {f"{s}.{n}": t for s, d in adapter.items() for n, t in d.tensors().items()}
        found.append(products)
    return found


def whole(model: LoadedModel) -> tuple[Tensor, list[dict[str, Tensor]]]:
    ids, positions, targets = padded()
    with cohort(model) as both:
        route(both)
        loss = cross_entropy(logits_at(model, ids, positions), targets)
        loss.backward()
        return loss.detach(), stepped([both])


def parts(
    model: LoadedModel, lower: int, upper: int | None
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The same by parts that exchange nothing but detached hidden states and their gradients."""
    ids, positions, targets = padded()
    cut = Cut(model, lower, upper)
    with cohort(model) as both:
        route(both)
        sent = [cut.head(ids)]
        received = [sent[0].detach().requires_grad_()]
        if upper is not None:
            sent.append(cut.middle(received[0]))
            received.append(sent[1].detach().requires_grad_())
        loss = cross_entropy(cut.tail(received[-1], positions), targets)
        loss.backward()
        for out, back in zip(reversed(sent), reversed(received), strict=True):
            out.backward(back.grad)
        return loss.detach(), stepped([both])


def assert_same(
    got: tuple[Tensor, list[dict[str, Tensor]]], expected: tuple[Tensor, list[dict[str, Tensor]]]
) -> None:
    """Equal up to the order in which sums are added, in float64."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cut_gives_the_loss_and_gradients_of_the_whole_model(architecture, checkpointing):
    model = deep(architecture, checkpointing)
    expected = whole(model)
    for lower, upper in CUTS:
        assert_same(parts(model, lower, upper), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_of_two_sides_are_together_the_adapter_of_the_whole(architecture):
    model = deep(architecture)
    ids, positions, targets = padded()
    cut = Cut(model, 1)
    below, above = side(model, Span(0, 1)), side(model, Span(1))
    with cohort(model, below) as lower, cohort(model, above) as upper:
        route(lower)
        route(upper)
        sent = cut.head(ids)
        received = sent.detach().requires_grad_()
        loss = cross_entropy(cut.tail(received, positions), targets)
        loss.backward()
        sent.backward(received.grad)
        got = loss.detach(), stepped([lower, upper])
    assert not set(below.spec.shapes) & set(above.spec.shapes)
    assert_same(got, whole(model))


def test_a_step_moves_every_site_so_that_equal_steps_say_something():
    model = deep("llama")
    _, (first, _) = whole(model)
    start = {
        f"{s}.{n}": t for s, d in slots(model)[0].start.items() for n, t in d.tensors().items()
    }
    assert all((first[name] - start[name]).abs().max() > 1e-4 for name in start)


def test_each_part_runs_its_own_blocks_and_no_other():
    model = deep("llama")
    ids, positions, _ = padded()
    ran: list[int] = []
    for index, block in enumerate(model.module.model.layers):
        block.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    cut = Cut(model, 1, 3)
    with torch.no_grad():
        hidden = cut.head(ids)
        assert ran == [0]
        hidden = cut.middle(hidden)
        cut.tail(hidden, positions)  # A block is run once more to learn what blocks give.
        ran.clear()
        hidden = cut.middle(hidden)
        assert ran == [1, 2]
        ran.clear()
        cut.tail(hidden, positions)
        assert ran == [3]


def surroundings(model: LoadedModel) -> list[tuple[object, ...]]:
    return [
        (name, vars(m).get("forward"), *m._forward_pre_hooks, *m._forward_hooks)
        for name, m in model.module.named_modules()
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was_also_after_errors(checkpointing):
    model = deep("gpt2", checkpointing)
    ids, positions, _ = padded()
    cut = Cut(model, 1, 3)
    before = surroundings(model)
    hidden = cut.head(ids)
    cut.tail(cut.middle(hidden), positions)
    assert surroundings(model) == before
    with pytest.raises(IndexError):
        cut.head(ids + VOCABULARY)
    with pytest.raises(RuntimeError):
        cut.middle(hidden.float())
    with pytest.raises((IndexError, RuntimeError)):
        cut.tail(hidden, positions + 10**6)
    assert surroundings(model) == before
    expected = deep("gpt2", checkpointing)
    assert torch.equal(logits_at(model, ids, positions), logits_at(expected, ids, positions))


@pytest.mark.parametrize(
    ("lower", "upper", "says"),
    [
        (0, None, "cut: expected 1…3"),
        (4, None, "cut: expected 1…3"),
        (-1, None, "cut: expected 1…3"),
        (1, 4, "upper cut: expected 1…3"),
        (2, 2, "upper cut: expected 3…3, above the lower cut at 2, got 2"),
        (3, 1, "above the lower cut"),
    ],
)
def test_a_cut_outside_the_model_is_refused(lower, upper, says):
    with pytest.raises(ModelError, match=says):
        Cut(deep("llama"), lower, upper)


def test_hidden_states_of_another_shape_are_refused():
    cut = Cut(deep("llama"), 1)
    with pytest.raises(ModelError, match=r"expected hidden states of B×T×16 .* got \(3, 9, 8\)"):
        cut.tail(torch.zeros(3, 9, 8, dtype=torch.float64), torch.tensor([0]))
    with pytest.raises(ModelError, match="no upper block"):
        cut.middle(torch.zeros(3, 9, 16, dtype=torch.float64))


def test_a_site_that_is_tied_to_a_weight_beyond_the_cut_is_refused():
    model = deep("llama")
    layers = model.module.model.layers
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(SiteError, match=r"layers\.1\.mlp.* is adapted .* tied to .*layers\.3"):
        Cut(model, 2)
    Cut(model, 1)  # Both lie in the tail.
    with pytest.raises(SiteError, match="is tied to"):
        Cut(model, 1, 2)
    Cut(side(model, Span(0, 1), Span(2, 3)), 2)  # Neither is adapted.


def test_a_module_that_stands_for_several_blocks_is_refused():
    model = deep("llama")
    model.module.model.layers[2] = model.module.model.layers[0]
    with pytest.raises(ModelError, match="one module stands for several blocks"):
        Cut(model, 1)


def test_a_model_without_blocks_to_be_found_is_refused():
    model = deep("llama")
    model.module.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="expected a ModuleList of as many decoder blocks"):
        Cut(model, 1)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    model = deep("llama")
    inner = model.module.model

    def carrying(block):
        plain = block.forward

        def forward(hidden, carried, **kwargs):
            return plain(hidden, **kwargs) + carried, carried + 1

        return forward

    for block in inner.layers:
        block.forward = carrying(block)

    def forward(input_ids=None, inputs_embeds=None, **_):
        hidden = inner.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        places = torch.arange(hidden.shape[1])[None]
        around = inner.rotary_emb(hidden, places)
        carried = torch.zeros(())
        for block in inner.layers:
            hidden, carried = block(hidden, carried, position_embeddings=around)
        return type("Output", (), {"last_hidden_state": inner.norm(hidden)})()

    inner.forward = forward
    ids, positions, _ = padded()
    cut = Cut(model, 2)
    hidden = cut.head(ids)
    with pytest.raises(ModelError, match="hand each other more than hidden states"):
        cut.tail(hidden, positions)


def test_a_side_has_the_sites_of_its_blocks():
    model = deep("llama")
    ends = side(model, Span(0, 1), Span(3))
    assert {site.block for site in ends.spec.sites} == {0, 3}
    assert ends.module is model.module
    only = replace(model, spec=side(model, Span(0, 1)).spec)
    with pytest.raises(SiteError, match=r"none of the chosen sites lies in blocks \[1, 2, 3\]"):
        side(only, Span(1))


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([], "at least one span"),
        ([Span(2, 2)], "got blocks 2 up to 2"),
        ([Span(3, 5)], "this model has 4 blocks"),
        ([Span(-1, 2)], "within 0…4"),
        ([Span(0, 2), Span(1)], "block 1 is in two spans"),
    ],
)
def test_spans_that_are_no_part_of_the_model_are_refused(spans, says):
    with pytest.raises(ModelError, match=says):
        side(deep("llama"), *spans)
