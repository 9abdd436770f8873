"""Every kind of assignment, trained in a cohort, against whole matrices and autograd in float64."""

import dataclasses

import pytest
import torch

from dense_oracle import (
    assigned,
    difference,
    random_dense,
    random_merged,
    random_sparse,
    train_densely,
)
from jobs import by_group, job
from models import tiny_loaded
from polyrank.aggregation import TRAINED, Penalty
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import RankError, SiteError
from polyrank.training import Job, LocalTraining, train_cohort

TOLERANCE = 1e-9  # float64; sums in another order, which AdamW may enlarge a little
ARCHITECTURES = ["llama", "gpt2"]

WAYS = [
    LocalTraining(lr=1e-2, epochs=None, steps=5, batch=4, clip=0.3, weight_decay=0.1, warmup=0.3),
    LocalTraining(
        optimizer="sgd",
        lr=0.05,
        epochs=None,
        steps=7,
        batch=3,
        accumulation=2,
        clip=0,
        momentum=0.9,
        schedule="cosine",
    ),
    LocalTraining(lr=3e-3, epochs=1.5, batch=5, clip=0.05),
]


def three(model, **settings) -> list[Job]:
    """Clients of unequal ranks, data, steps, optimizers and scales; FedProx as `settings` say."""
    ranks = [by_group(model, 2, 4), 1, 5]
    return [
        job(
            model,
            f"c{i}",
            ranks=ranks[i],
            scale=(0.5, 16.0, 2.0)[i],
            count=(13, 7, 21)[i],
            seed=i,
            frozen=(0, 2, 1)[i],
            local=dataclasses.replace(WAYS[i], **settings),
        )
        for i in range(3)
    ]


@pytest.fixture(autouse=True)
def a_alone(monkeypatch):
    """Another way of training, as RoLoRA's (arXiv 2502.01755), is one entry of the table."""
    monkeypatch.setitem(TRAINED, "a", ("a",))


def b_only(model):
    return [assigned(one, train="b") for one in three(model)]


def a_only(model):
    return [assigned(one, train="a") for one in three(model)]


def penalised(model):
    jobs = three(model)
    keeps = [1, 0, 3]
    return [
        assigned(one, penalty=Penalty(0.5 + k, dict.fromkeys(one.assignment.start, keep)))
        for k, (one, keep) in enumerate(zip(jobs, keeps, strict=True))
    ]


def sparse(model):
    counts = [30, 7, 50]
    return [
        assigned(
            one, start=random_sparse(model, count, seed=k, without=k), scale=one.assignment.scale
        )
        for k, (one, count) in enumerate(zip(three(model), counts, strict=True))
    ]


def proximal(model):
    return three(model, proximal=0.7)


def sparse_proximal(model):
    return [
        dataclasses.replace(one, local=dataclasses.replace(one.local, proximal=0.7))
        for one in sparse(model)
    ]


def dense(model):
    """Whole matrices; the second client trains nothing at the first site, the third at two."""
    return [
        assigned(one, start=random_dense(model, seed=k, without=k))
        for k, one in enumerate(three(model))
    ]


def dense_proximal(model):
    """With FedProx, over merged sums."""
    sums = random_merged(model, every=2)
    return [
        assigned(
            dataclasses.replace(one, local=dataclasses.replace(one.local, proximal=0.7)),
            merged=sums,
        )
        for one in dense(model)
    ]


def merged(model):
    sums = random_merged(model, every=2)
    return [assigned(one, merged=sums) for one in three(model)]


def merged_sparse(model):
    sums = random_merged(model, every=3)
    return [assigned(one, merged=sums) for one in sparse(model)]


def mixed_ways(model):
    """One trains B alone, one all with a penalty, one all with FedProx, over merged sums."""
    sums = random_merged(model)
    one, two, three_ = (assigned(it, merged=sums) for it in three(model))
    return [
        assigned(one, train="b"),
        assigned(two, penalty=Penalty(2.0, dict.fromkeys(two.assignment.start, 0))),
        dataclasses.replace(three_, local=dataclasses.replace(three_.local, proximal=0.3)),
    ]


KINDS = {
    "b": b_only,
    "a": a_only,
    "penalty": penalised,
    "sparse": sparse,
    "fedprox": proximal,
    "sparse fedprox": sparse_proximal,
    "merged": merged,
    "merged sparse": merged_sparse,
    "mixed": mixed_ways,
    "dense": dense,
    "merged dense fedprox": dense_proximal,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_of_unequal_clients_gives_what_whole_matrices_give_one_by_one(architecture, kind):
    model = tiny_loaded(architecture, dtype=torch.float64)
    jobs = KINDS[kind](model)
    together = train_cohort(model, jobs)
    for one, trained in zip(jobs, together, strict=True):
        assert trained.failure is None
        expected, loss = train_densely(model, one)
        assert difference(expected, one.assignment.start) > 1e-3, "it has to learn something"
        assert difference(trained.adapter, expected) < TOLERANCE
        assert trained.metrics["loss"] == pytest.approx(loss, rel=1e-9), "the task's loss alone"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_alone_under_checkpointing_and_in_another_order(kind):
    model = tiny_loaded("gpt2", dtype=torch.float64)
    saving = tiny_loaded("gpt2", dtype=torch.float64, checkpointing=True)
    jobs = KINDS[kind](model)
    together = train_cohort(model, jobs)
    others = [
        [train_cohort(model, [one])[0] for one in jobs],
        train_cohort(model, jobs[::-1])[::-1],
        train_cohort(saving, jobs),
    ]
    for found in others:
        for one, other in zip(together, found, strict=True):
            assert difference(one.adapter, other.adapter) < 1e-10
            assert one.metrics == pytest.approx(other.metrics, rel=1e-9)


# --- B alone ---


@pytest.mark.parametrize(("trained", "still"), ["ba", "ab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_factor_comes_back_bit_by_bit_also_under_weight_decay(dtype, trained, still):
    model = tiny_loaded("gpt2", dtype=dtype)
    local = LocalTraining(lr=1e-2, weight_decay=0.5, batch=2, proximal=0.1)
    jobs = [job(model, name, ranks=r, scale=0.7, local=local) for name, r in (("a", 3), ("b", 2))]
    jobs = [_float32(one) for one in jobs]
    jobs[0] = assigned(jobs[0], train=trained)  # beside a client that trains both
    for one, result in zip(jobs, train_cohort(model, jobs), strict=True):
        for site, start in one.assignment.start.items():
            before, after = start.tensors(), result.adapter[site].tensors()
            assert not torch.equal(before[trained], after[trained])
            assert torch.equal(before[still], after[still]) == (one.client == "a")


def test_the_norm_that_is_clipped_is_that_of_b_alone():
    model = tiny_loaded("llama", dtype=torch.float64)
    both = job(model, ranks=3, local=LocalTraining(batch=9, epochs=1, clip=0))
    fixed = assigned(both, train="b")
    norms = [t.metrics["grad_norm"] for t in train_cohort(model, [both, fixed])]
    assert norms[1] < norms[0]


# --- FedProx ---


def test_a_strong_pull_keeps_the_start_and_a_weaker_one_lets_go():
    model = tiny_loaded("llama", dtype=torch.float64)

    def moved(mu: float) -> float:
        local = LocalTraining(optimizer="sgd", lr=1e-4, steps=60, batch=9, clip=0, proximal=mu)
        one = job(model, local=local)
        return difference(train_cohort(model, [one])[0].adapter, one.assignment.start)

    free, held, tight = moved(0.0), moved(1e3), moved(9e3)
    # It settles where μ·distance = gradient, so the distance falls as 1/μ.
    assert tight < 0.2 * held < 0.2 * free


def test_a_step_of_plain_sgd_is_the_start_less_rate_times_gradient():
    """By hand: θ − lr·g, with g from autograd; FedProx's term is zero at the start."""
    model = tiny_loaded("llama", dtype=torch.float64)
    local = LocalTraining(optimizer="sgd", lr=0.1, steps=1, batch=9, clip=0, proximal=5.0)
    one = job(model, scale=4.0, count=9, local=local)
    trained = train_cohort(model, [one])[0].adapter
    start, scale = one.assignment.start, one.assignment.scale
    leaves = {s: (d.b / scale[s]).requires_grad_() for s, d in start.items()}
    weights = {
        f"{s}.weight": model.module.get_submodule(s).weight + scale[s] * leaves[s] @ d.a
        for s, d in start.items()
    }
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for row in one.examples:
        ids = torch.tensor([row.input_ids])
        logits = torch.func.functional_call(model.module, weights, (ids,)).logits[0]
        picked = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[row.loss_from - 1 :]
        total, targets = total - picked.sum(), targets + len(picked)
    (total / targets).backward()
    for site, b in leaves.items():
        expected = (b.detach() - 0.1 * b.grad) * scale[site]
        torch.testing.assert_close(trained[site].b, expected, rtol=0, atol=1e-12)


# --- the penalty ---


@pytest.mark.parametrize("zeroed", ["b", "a", "both"])
def test_a_penalty_beside_a_zero_factor_gives_no_nan(zeroed):
    """As at LoRA's own start, B = 0: the product's gradient is zero in A and λ‖A‖·0 in B."""
    model = tiny_loaded("llama")
    one = job(model, ranks=4, local=LocalTraining(lr=1e-2, batch=4))
    start = {
        site: LowRank(
            torch.zeros_like(d.b) if zeroed != "a" else d.b,
            torch.zeros_like(d.a) if zeroed != "b" else d.a,
        )
        for site, d in one.assignment.start.items()
    }
    one = assigned(one, start=Adapter(start), penalty=Penalty(1.0, dict.fromkeys(start, 2)))
    trained = train_cohort(model, [one])[0]
    assert trained.failure is None
    assert all(delta.is_finite() for delta in trained.adapter.values())


def test_a_penalty_shrinks_the_ranks_behind_those_to_keep():
    model = tiny_loaded("llama", dtype=torch.float64)
    plain = job(model, ranks=4, local=LocalTraining(lr=2e-2, epochs=20, batch=9, clip=0))
    pressed = assigned(plain, penalty=Penalty(10.0, dict.fromkeys(plain.assignment.start, 2)))
    free, pruned = (t.adapter for t in train_cohort(model, [plain, pressed]))
    for site in free:
        tails = [d.b[:, 2:].norm() * d.a[2:].norm() for d in (free[site], pruned[site])]
        assert tails[1] < 0.5 * tails[0]


# --- sparse starts ---


def test_sparse_training_returns_the_very_positions_and_moves_their_values_alone():
    model = tiny_loaded("llama")
    one = sparse(tiny_loaded("llama", dtype=torch.float64))[1]
    one = _float32(one)
    trained = train_cohort(model, [one])[0].adapter
    for site, start in one.assignment.start.items():
        if isinstance(start, Sparse):
            assert trained[site].positions is start.positions
            assert trained[site].values.dtype == torch.float32
            assert not torch.equal(trained[site].values, start.values)
        else:
            assert trained[site].shape == start.shape
            assert trained[site].rank == 0


def test_sparse_training_ignores_dropout_and_scale():
    model = tiny_loaded("llama", dtype=torch.float64)
    plain = sparse(model)[0]
    other = dataclasses.replace(
        assigned(plain, scale=dict.fromkeys(plain.assignment.start, 7.0)),
        local=dataclasses.replace(plain.local, dropout=0.5),
    )
    one, two = (train_cohort(model, [it])[0].adapter.hash() for it in (plain, other))
    assert one == two


def test_values_of_a_shorter_client_are_padded_by_zeros_with_zero_gradients():
    from models import batch
    from polyrank.model import Cohort, Part, Slot

    model = tiny_loaded("llama", dtype=torch.float64)
    starts = [random_sparse(model, count, seed=count) for count in (5, 12)]
    slots = [Slot(start, dict.fromkeys(start, 1.0)) for start in starts]
    with Cohort(model, slots) as cohort:
        cohort.route([Part(0, 1, 7), Part(1, 2, 7)])
        model.module(batch(3, 7)).logits.square().sum().backward()
        [short], [long] = (cohort.parameters(k) for k in range(2))
        assert len(short) == len(long) == 12 * len(starts[0])
        assert int(short.grad.count_nonzero()) == int(short.count_nonzero()) == 5 * len(starts[0])
        assert int(long.grad.count_nonzero()) == 12 * len(starts[0])


# --- dense starts ---


def test_dense_training_ignores_dropout_and_scale():
    model = tiny_loaded("llama", dtype=torch.float64)
    plain = dense(model)[0]
    other = dataclasses.replace(
        assigned(plain, scale=dict.fromkeys(plain.assignment.start, 7.0)),
        local=dataclasses.replace(plain.local, dropout=0.5),
    )
    one, two = (train_cohort(model, [it])[0].adapter.hash() for it in (plain, other))
    assert one == two


def test_a_client_without_a_matrix_at_a_site_has_zero_gradients_there():
    from models import batch
    from polyrank.model import Cohort, Part, Slot

    model = tiny_loaded("llama", dtype=torch.float64)
    starts = [random_dense(model, seed=1, without=without) for without in (1, 0)]
    slots = [Slot(start, dict.fromkeys(start, 1.0)) for start in starts]
    m, n = next(iter(starts[0].values())).shape
    with Cohort(model, slots) as cohort:
        cohort.route([Part(0, 1, 7), Part(1, 2, 7)])
        model.module(batch(3, 7)).logits.square().sum().backward()
        [lacking], [full] = (cohort.parameters(k) for k in range(2))
        assert not lacking.grad[: m * n].any()
        assert not lacking[: m * n].any()
        assert int(lacking.grad.count_nonzero()) == len(lacking) - m * n
        assert int(full.grad.count_nonzero()) == len(full)
        read = cohort.adapter(0)
        assert {site: delta.rank > 0 for site, delta in read.items()} == {
            site: isinstance(delta, Dense) for site, delta in starts[0].items()
        }


def test_dense_training_on_a_bfloat16_base_is_in_float32_and_leaves_the_base_alone():
    model = tiny_loaded("llama", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    one = _float32(dense(tiny_loaded("llama", dtype=torch.float64))[0])
    trained = train_cohort(model, [one])[0].adapter
    for site, start in one.assignment.start.items():
        assert trained[site].matrix.dtype == torch.float32
        assert not torch.equal(trained[site].matrix, start.matrix)
    assert all(torch.equal(before[name], p) for name, p in model.module.named_parameters())


# --- what is refused ---


def test_assignments_that_cannot_be_trained_together_or_at_all_are_refused_with_the_reason():
    model = tiny_loaded("llama", dtype=torch.float64)
    one, two = three(model)[:2]
    with pytest.raises(SiteError, match="c0 and c1: other sums are merged"):
        train_cohort(model, [assigned(one, merged=random_merged(model)), two])
    few = sparse(model)[0]
    with pytest.raises(SiteError, match="some starts are sparse and some are factors"):
        train_cohort(model, [few, two])
    with pytest.raises(SiteError, match="no B to train alone"):
        train_cohort(model, [assigned(few, train="b")])
    site, start = next(iter(few.assignment.start.items()))
    with pytest.raises(SiteError, match=r"a penalty at .* where no factors"):
        train_cohort(model, [assigned(few, penalty=Penalty(1.0, {site: 1}))])
    for strength in (-1.0, float("nan")):
        with pytest.raises(SiteError, match="penalty of 0 or more"):
            train_cohort(model, [assigned(one, penalty=Penalty(strength, {site: 1}))])
    with pytest.raises(RankError, match="keeps ranks of 0 or more"):
        train_cohort(model, [assigned(one, penalty=Penalty(1.0, {site: -1}))])
    whole = Adapter({**one.assignment.start, site: Dense(start.dense())})
    with pytest.raises(SiteError, match="some starts are factors and some are dense"):
        train_cohort(model, [assigned(one, start=whole)])
    with pytest.raises(SiteError, match="some starts are sparse and some are dense"):
        train_cohort(model, [few, dense(model)[0]])
    with pytest.raises(SiteError, match="a dense start has no B to train alone"):
        train_cohort(model, [assigned(dense(model)[0], train="b")])
    for beyond in (-1, start.shape[0] * start.shape[1]):
        outside = Sparse(start.values[:1], torch.tensor([beyond]), start.shape)
        with pytest.raises(SiteError, match="expected positions in 0"):
            train_cohort(
                model, [assigned(few, start=Adapter({**few.assignment.start, site: outside}))]
            )


def test_equal_sums_that_are_not_the_same_tensors_are_trained_together():
    model = tiny_loaded("llama", dtype=torch.float64)
    one, two = three(model)[:2]
    jobs = [assigned(it, merged=random_merged(model)) for it in (one, two)]
    assert all(trained.failure is None for trained in train_cohort(model, jobs))


def _float32(one: Job) -> Job:
    return assigned(one, start=one.assignment.start.to(dtype=torch.float32))
