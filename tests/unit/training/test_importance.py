"""Importance without a weight gradient equals the sums of explicit weight gradients."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoConfig

from dense_oracle import random_merged
from jobs import examples, job
from models import PAD, tiny_loaded, tiny_tokenizer
from polyrank.aggregation.types import Penalty
from polyrank.algebra import Adapter, Dense
from polyrank.errors import RecipeError, SiteError
from polyrank.model import Cohort, Part, Slot, logits_at, wrap_model
from polyrank.training import (
    Scoring,
    scoring_cost,
    scoring_interval,
    slot_bytes,
    train_cohort,
)
from polyrank.training.batches import assemble
from polyrank.training.capacity import MARGIN
from polyrank.training.interval import interval
from polyrank.training.local import slot_of
from scoring import (
    BLOCKS,
    EVERY,
    LOCAL,
    METRICS,
    assert_scores,
    cohort_products,
    deep,
    dense_products,
    f64,
    first_groups,
    fleet,
    lowest_untouched,
    same,
    scores,
)

# --- against explicit gradients -------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "qwen2", "qwen3", "gemma2", "opt", "phi3", "gpt_neox"]
)
def test_scores_are_those_of_explicit_weight_gradients(architecture: str, metric: str) -> None:
    model = f64(architecture)
    one = job(model, ranks=3, frozen=2, local=LOCAL, seed=5)
    assert len(first_groups(one)) == 2
    assert_scores(scores(model, one, metric), dense_products(model, one), metric, 1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_penalty_and_fedprox_are_no_part_of_the_loss_that_is_scored(metric: str) -> None:
    model = f64()
    one = job(model, ranks=3, local=replace(LOCAL, proximal=0.5), seed=5)
    penalty = Penalty(0.3, dict.fromkeys(one.assignment.start, 1))
    one = replace(one, assignment=replace(one.assignment, penalty=penalty))
    assert_scores(scores(model, one, metric), dense_products(model, one), metric, 1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_they_are_with_dropout_too(architecture: str, metric: str) -> None:
    model = f64(architecture)
    one = job(model, ranks=3, local=replace(LOCAL, dropout=0.4), seed=6)
    assert_scores(scores(model, one, metric), cohort_products(model, one), metric, 1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_they_are_on_a_bfloat16_base(architecture: str, metric: str) -> None:
    model = tiny_loaded(architecture, dtype=torch.bfloat16)
    one = job(model, ranks=3, local=LOCAL, seed=6)
    start = one.assignment.start.to(dtype=torch.float32)
    one = replace(one, assignment=replace(one.assignment, start=start))
    # The products differ by the rounding of each output and of each sum in G to 8 bits of mantissa.
    assert_scores(scores(model, one, metric), cohort_products(model, one), metric, 2**-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_merged_is_part_of_the_weight_however_it_acts(
    dtype: torch.dtype, metric: str
) -> None:
    model = tiny_loaded("llama", dtype=dtype)
    one = job(model, ranks=2, local=LOCAL, seed=7)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    merged: Adapter[Dense] = random_merged(model, every=2).to(dtype=held)
    start = one.assignment.start.to(dtype=held)
    one = replace(one, assignment=replace(one.assignment, start=start, merged=merged))
    # As above in bfloat16; in float32 a few dozen roundings.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    got = scores(model, one, metric)
    assert_scores(got, cohort_products(model, one), metric, tolerance)
    if dtype == torch.float64:
        assert_scores(got, dense_products(model, one), metric, tolerance)


def test_sites_where_nothing_acts_are_scored_down_to_the_lowest_block() -> None:
    model = deep()
    one = job(model, ranks=lowest_untouched(model, 3), local=LOCAL, seed=8)
    assert_scores(scores(model, one), dense_products(model, one), "channel", 1e-12)


def test_a_base_without_any_adapter_is_scored() -> None:
    model = f64()
    one = job(model, ranks=0, local=LOCAL, seed=8)
    assert_scores(scores(model, one), dense_products(model, one), "channel", 1e-12)


@pytest.mark.parametrize("below", [0, 3])
def test_blocks_that_are_computed_again_count_once(below: int) -> None:
    model = deep(checkpointing=True)
    local = replace(LOCAL, dropout=0.3)
    one = job(model, ranks=lowest_untouched(model, below), local=local, seed=8)
    same(scores(model, one), scores(deep(), one), 1e-12)


def test_a_model_that_writes_to_the_output_of_a_site_is_scored_as_it_was_before() -> None:
    config = OlmoConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        clip_qkv=0.2,
        pad_token_id=PAD,
        eos_token_id=2,
        bos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config).double()
        for parameter in module.parameters():
            parameter.data.mul_(10.0)
    model = wrap_model(module.eval(), tiny_tokenizer())
    ranks = {s.name: 0 if "self_attn" in s.name else 2 for s in model.spec.sites}
    one = job(model, ranks=ranks, local=LOCAL, seed=9)
    assert_scores(scores(model, one), dense_products(model, one), "channel", 1e-12)


# --- many clients, many steps ---------------------------------------------------------------------


def test_a_slot_scores_in_a_mixed_cohort_what_it_scores_alone() -> None:
    model = f64()
    jobs = fleet(model, dropout=0.2)
    jobs[1] = replace(jobs[1], scoring=Scoring(2, "paper"))
    jobs.append(replace(jobs[0], client="d", seed=11, scoring=Scoring(0)))
    together = train_cohort(model, jobs)
    for one, mine in zip(jobs[:3], together, strict=False):
        same(mine.importance, train_cohort(model, [one])[0].importance)
    assert together[3].importance == {}


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_every_nth_step_is_scored_and_the_mean_is_reported(every: int) -> None:
    model, count = f64(), 5
    local = replace(LOCAL, steps=count, accumulation=1)
    one = job(model, local=local, seed=10)

    def mean(steps: int, every: int) -> Mapping[str, float]:
        asked = replace(one, local=replace(local, steps=steps), scoring=Scoring(every))
        return train_cohort(model, [asked])[0].importance

    # The means over the first 1, 2, … steps give each step's own scores.
    means = [mean(steps, 1) for steps in range(1, count + 1)]
    of_step = [
        {s: (k + 1) * means[k][s] - (k * means[k - 1][s] if k else 0.0) for s in means[k]}
        for k in range(count)
    ]
    scored = of_step[::every]
    expected = {s: sum(each[s] for each in scored) / len(scored) for s in means[0]}
    same(mean(count, every), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scoring_changes_no_bit_of_what_is_trained(dtype: torch.dtype, checkpointing: bool) -> None:
    model = tiny_loaded("llama", num_hidden_layers=BLOCKS, dtype=dtype, checkpointing=checkpointing)
    jobs = fleet(model, Scoring(2), dropout=0.2)
    jobs[2] = replace(
        job(model, "c", ranks=lowest_untouched(model, 2), count=7, local=jobs[2].local),
        scoring=Scoring(2),
    )
    with_scores = train_cohort(model, jobs)
    without = train_cohort(model, [replace(one, scoring=Scoring(0)) for one in jobs])
    for one, other in zip(with_scores, without, strict=True):
        assert one.adapter.hash() == other.adapter.hash()
        assert one.metrics == other.metrics
        assert one.importance
        assert not other.importance


def test_the_model_is_as_it_was_after_scoring_also_after_an_error() -> None:
    model = f64()
    hooks = [len(m._forward_hooks) for m in model.module.modules()]
    scores(model, job(model, local=LOCAL))
    slot = slot_of(job(model).assignment, LOCAL, 0)
    with pytest.raises(KeyError), Cohort(model, [slot], scored=True):
        raise KeyError
    assert [len(m._forward_hooks) for m in model.module.modules()] == hooks


def test_a_client_that_diverges_has_no_scores_and_the_others_keep_theirs() -> None:
    model = f64()
    good = fleet(model)
    worst = job(model, "x", ranks=2, seed=4, local=good[0].local)
    start = worst.assignment.start
    broken = {site: delta.scale(1e308).scale(1e10) for site, delta in start.items()}
    worst = replace(
        worst, assignment=replace(worst.assignment, start=Adapter(broken)), scoring=EVERY
    )
    found = train_cohort(model, [good[0], worst, good[1]])
    assert found[1].failure is not None
    assert found[1].importance == {}
    same(found[0].importance, train_cohort(model, [good[0]])[0].importance)
    same(found[2].importance, train_cohort(model, [good[1]])[0].importance)


def test_passes_that_are_not_scored_add_nothing() -> None:
    model = f64()
    one = job(model, local=LOCAL)
    slot = slot_of(one.assignment, LOCAL, 0)
    rows = examples(2, seed=1)
    batch = assemble(rows, PAD, model.device)
    longest = max(len(row.input_ids) for row in rows)
    with Cohort(model, [slot, slot], scored=True) as cohort:
        for scored in ((False, False), (False, True)):
            cohort.route([Part(k, 1, longest, scored=scored[k]) for k in range(2)])
            logits_at(model, batch.input_ids, batch.positions).sum().backward()
        assert set(cohort.scores(0, "channel").values()) == {0.0}
        assert min(cohort.scores(1, "channel").values()) > 0.0
        cohort.zero_gradients([0])
        assert min(cohort.scores(1, "channel").values()) > 0.0
        cohort.zero_gradients([1])
        assert set(cohort.scores(1, "channel").values()) == {0.0}


# --- what the metrics see -------------------------------------------------------------------------


def test_paper_vanishes_before_norms_and_is_equal_in_pairs_and_channel_is_not() -> None:
    qwen, llama = f64("qwen3"), f64("llama")
    bare = {m: job(m, ranks=0, local=LOCAL) for m in (qwen, llama)}
    paper, channel = scores(qwen, bare[qwen], "paper"), scores(qwen, bare[qwen])
    for site in paper:  # The loss does not change when q or k grows, but for the norm's epsilon.
        if "q_proj" in site or "k_proj" in site:
            assert paper[site] < 1e-3 * channel[site]
    paper, channel = scores(llama, bare[llama], "paper"), scores(llama, bare[llama])
    for first, second in (("q_proj", "k_proj"), ("v_proj", "o_proj"), ("up_proj", "down_proj")):
        for site in (s for s in paper if first in s):
            other = site.replace(first, second)
            if (first, second) == ("v_proj", "o_proj") or "proj" in other:
                assert paper[site] == pytest.approx(paper[other], rel=1e-9, abs=1e-12)
                assert abs(channel[site] - channel[other]) > 1e-3 * channel[site]


# --- the interval, and refusals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "n"), [(0.0, 1), (0.05, 1), (0.051, 2), (0.1, 2), (0.26, 6), (1.0, 20)]
)
def test_the_interval_is_the_smallest_that_keeps_the_cost_below_5_percent(
    extra: float, n: int
) -> None:
    assert interval(extra) == n
    assert extra / n <= 0.05
    assert n == 1 or extra / (n - 1) > 0.05


def test_the_cost_is_the_median_ratio_by_the_clock() -> None:
    model = f64()
    now, passes = [0.0], []

    class Clocked:
        """A clock that makes scored passes take 1.3 units and the others 1, one of them 50."""

        def __init__(self) -> None:
            self.started = False

        def __call__(self) -> float:
            self.started = not self.started
            if not self.started:
                passes.append(taps[0])
                now[0] += 50.0 if len(passes) == 4 else 1.3 if taps[0] else 1.0
            taps[0] = False
            return now[0]

    taps = [False]

    def spy(*_: object) -> None:
        taps[0] = True

    site = model.spec.sites[0].name
    model.module.get_submodule(site).register_full_backward_hook(spy)
    assert scoring_cost(model, ranks={}, passes=5, clock=Clocked()) == pytest.approx(0.3)
    assert passes[:2] == [True, False]
    assert (sum(passes), len(passes)) == (6, 12)
    assert passes[2:6] in ([False, True, True, False], [True, False, False, True])
    assert scoring_interval(model, "paper", ranks={}, passes=5, clock=Clocked()) == 6


def test_a_pass_that_is_scored_counts_the_outputs_that_it_keeps() -> None:
    model = f64()
    ranks, outputs = dict.fromkeys(model.spec.shapes, 2), sum(s.m for s in model.spec.sites)
    plain, scored = (slot_bytes(model, ranks, LOCAL, 40, 1, scored=on) for on in (False, True))
    grown = (scored - plain) / MARGIN / (LOCAL.batch * 40 * 8)
    assert 0.9 * outputs <= grown <= 1.5 * outputs


def test_what_cannot_be_scored_is_refused() -> None:
    model = f64()
    with pytest.raises(RecipeError, match=r"a metric of \['channel', 'paper'\], got 'sum'"):
        Scoring(1, "sum")
    with pytest.raises(RecipeError, match="got -1"):
        Scoring(-1)
    slot: Slot = slot_of(job(model).assignment, LOCAL, 0)
    with Cohort(model, [slot]) as cohort:
        with pytest.raises(SiteError, match="made with scored=True"):
            cohort.route([Part(0, 1, 4, scored=True)])
        with pytest.raises(SiteError, match="made with scored=True"):
            cohort.scores(0, "channel")
    with Cohort(model, [slot], scored=True) as cohort:
        with pytest.raises(SiteError, match="a metric of"):
            cohort.scores(0, "sum")
