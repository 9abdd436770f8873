"""One adapter at the server for all split clients learns from their batches as if concatenated."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from by_hand import (
    BENT,
    STRAIGHT,
    assert_equal,
    model_of_three,
    refusal,
    requests_of,
    served,
    server_job,
)
from by_hand import LOCAL as BY_HAND
from jobs import examples
from models import random_adapter, tiny_loaded
from polyrank.aggregation import FLoRA, HetLoRA
from polyrank.aggregation.types import Assignment, Penalty
from polyrank.algebra import Adapter, Dense, LowRank
from polyrank.data.types import Encoded
from polyrank.errors import RankError, RuleError
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.run import preflight
from polyrank.training import Job, LocalTraining, Trained
from polyrank.training.batches import step_groups
from polyrank.training.split import (
    Returned,
    ServerPart,
    ServerParts,
    SplitJob,
    SplitSettings,
    train_split,
)
from polyrank.transport import InProcessLinks

SHARED = SplitSettings(wire="float64", adapters="shared")
OWN = replace(SHARED, adapters="own")
LOCAL = LocalTraining(epochs=1, batch=2, accumulation=2, lr=1e-2, clip=0, weight_decay=0.1)
# OPT's norms compute in float64 too; Llama's go through float32, where a factor before or after the
# backward pass is seen at 1e-8.
MODEL = tiny_loaded("opt", num_hidden_layers=4, dtype=torch.float64)
BLOCK = {site.name: site.block for site in MODEL.spec.sites}


def split(
    model: LoadedModel,
    jobs: Sequence[Job],
    cuts: Sequence[CutPoint],
    settings: SplitSettings = SHARED,
    cohort: int = 8,
) -> list[Trained]:
    def connect(server_part: ServerPart):
        return InProcessLinks(server_part, settings.wire, model.spec.hidden, 4096).link

    asked = [SplitJob(one, cut, 1) for one, cut in zip(jobs, cuts, strict=True)]
    return train_split(model, asked, settings, connect, cohort=cohort)


def fleet(
    counts: Mapping[str, int], local: LocalTraining = LOCAL, scale: float = 0.5, rank: int = 2
) -> list[Job]:
    """Return jobs of clients that were all sent the same, each with examples of its own."""
    start = random_adapter(MODEL, rank, seed=3)
    assignment = Assignment(start, dict.fromkeys(start, scale))
    return [
        Job(name, assignment, examples(count, seed=i), local, i)
        for i, (name, count) in enumerate(counts.items(), start=1)
    ]


# --- the oracle: dense weights, no cut, no padding, one row at a time ---


def summed_loss(weights: Mapping[str, Tensor], row: Encoded) -> Tensor:
    ids = torch.tensor([row.input_ids])
    named = {f"{site}.weight": weight for site, weight in weights.items()}
    logits = functional_call(MODEL.module, named, (ids,), {"use_cache": False}).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[row.loss_from - 1 : -1], ids[0, row.loss_from :], reduction="sum"
    )


class Learned:
    """Factors that one optimizer steps, of one client's head or of the shared set."""

    def __init__(self, assignment: Assignment, sites: Sequence[str], local: LocalTraining):
        self.scale, self.assignment, self.local = assignment.scale, assignment, local
        self.a = {s: assignment.start[s].a.clone().requires_grad_() for s in sites}
        self.b = {s: (assignment.start[s].b / assignment.scale[s]).requires_grad_() for s in sites}
        self.parameters = [*self.a.values(), *self.b.values()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=local.lr, weight_decay=local.weight_decay
        )

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for site, a in self.a.items():
            base = MODEL.module.get_submodule(site).weight.detach()
            for fixed in (self.assignment.frozen, self.assignment.merged):
                if site in fixed:
                    base = base + fixed[site].dense()
            found[site] = base + self.scale[site] * self.b[site] @ a
        return found

    def step(self, loss: Tensor) -> None:
        """Descend a loss, of which the graph is kept for others."""
        gradients = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.local.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.local.clip)

    def adapter(self) -> Adapter:
        return Adapter(
            {s: LowRank(self.scale[s] * self.b[s].detach(), a.detach()) for s, a in self.a.items()}
        )


def oracle(jobs: Sequence[Job], cuts: Sequence[CutPoint]) -> list[Adapter]:
    """Train as is said: heads descend their own mean loss, the shared set that of the union."""
    local = jobs[0].local
    servers = [cut.at_server(4) for cut in cuts]
    shared = Learned(
        jobs[0].assignment, [s for s in BLOCK if BLOCK[s] in frozenset().union(*servers)], local
    )
    heads = [
        Learned(one.assignment, [s for s in BLOCK if BLOCK[s] not in server], local)
        for one, server in zip(jobs, servers, strict=True)
    ]
    orders = [list(step_groups(len(one.examples), local, one.seed)) for one in jobs]
    for step in range(max(len(order) for order in orders)):
        total, tokens, stepping = torch.zeros((), dtype=torch.float64), 0, []
        for one, head, order in zip(jobs, heads, orders, strict=True):
            if step >= len(order):
                continue
            rows = [one.examples[i] for micro in order[step] for i in micro]
            # A client's own copy goes before the shared one where it runs the block itself.
            weights = {**shared.weights(), **head.weights()}
            loss = torch.stack([summed_loss(weights, row) for row in rows]).sum()
            targets = sum(row.targets for row in rows)
            head.step(loss / targets)
            total, tokens = total + loss, tokens + targets
            stepping.append((head, len(order)))
        shared.step(total / tokens)
        longest = max(len(order) for order in orders)
        for learned, steps in [*stepping, (shared, longest)]:
            learned.optimizer.param_groups[0]["lr"] = local.rate(step, steps)
            learned.optimizer.step()
    return [
        Adapter(
            {
                **{s: d for s, d in shared.adapter().items() if BLOCK[s] in server},
                **head.adapter(),
            }
        )
        for head, server in zip(heads, servers, strict=True)
    ]


def assert_as_by_hand(jobs: Sequence[Job], cuts: Sequence[CutPoint]) -> None:
    # Sums in another order, and AdamW's division by small second moments: 1e-10, not 1e-14.
    for trained, expected in zip(split(MODEL, jobs, cuts), oracle(jobs, cuts), strict=True):
        assert trained.failure is None
        assert_equal(trained.adapter, expected, 1e-10)
        with pytest.raises(AssertionError):
            assert_equal(trained.adapter, jobs[0].assignment.start, 1e-3)


EQUAL = {"a": 4, "b": 3, "c": 4}
UNEQUAL = {"a": 9, "b": 2, "c": 6}
MIXED = [CutPoint(1), CutPoint(2), CutPoint(3)]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("counts", [EQUAL, UNEQUAL], ids=["one step", "unequal steps"])
@pytest.mark.parametrize(
    "cuts",
    [[CutPoint(2)] * 3, MIXED, [CutPoint(1, 3)] * 3, [CutPoint(1, 2), CutPoint(2), CutPoint(3)]],
    ids=["equal", "mixed", "u-shapes", "both"],
)
def test_a_shared_set_descends_the_mean_loss_of_the_union(cuts, counts, clip) -> None:
    assert_as_by_hand(fleet(counts, replace(LOCAL, clip=clip)), cuts)


def test_the_schedule_of_a_shared_set_is_as_long_as_its_longest_client() -> None:
    assert_as_by_hand(fleet({"a": 2, "b": 9, "c": 6}, replace(LOCAL, schedule="linear")), MIXED)


def test_u_shapes_whose_blocks_do_not_touch_share_one_set() -> None:
    """No client has the block between theirs at the server."""
    assert_as_by_hand(fleet({"a": 4, "b": 3}), [CutPoint(1, 2), CutPoint(2, 3)])
    jobs, cuts = fleet({"a": 4, "b": 3}), [CutPoint(1, 2), CutPoint(3)]
    assert_as_by_hand(jobs, cuts)


def test_frozen_terms_and_merged_sums_act_at_every_cut() -> None:
    """Equal to a model that holds W + M from the start, and to the oracle's dense weights."""
    draw = torch.Generator().manual_seed(5)

    def matrix(site: str) -> Dense:
        shape = MODEL.spec.shapes[site]
        return Dense(torch.randn(*shape, generator=draw, dtype=torch.float64) / 10)

    merged = Adapter({site: matrix(site) for site in BLOCK})
    frozen = random_adapter(MODEL, 1, seed=9)
    jobs = [
        replace(one, assignment=replace(one.assignment, merged=merged, frozen=frozen))
        for one in fleet(EQUAL)
    ]
    assert_as_by_hand(jobs, MIXED)
    changed = tiny_loaded("opt", num_hidden_layers=4, dtype=torch.float64)
    with torch.no_grad():
        for site, delta in merged.items():
            changed.module.get_submodule(site).weight.add_(delta.matrix)
    unmerged = [
        replace(one, assignment=replace(one.assignment, merged=Adapter({}))) for one in jobs
    ]
    for one, other in zip(split(MODEL, jobs, MIXED), split(changed, unmerged, MIXED), strict=True):
        assert_equal(one.adapter, other.adapter, 1e-10)


def test_a_penalty_and_a_fixed_a_act_on_the_shared_set_once() -> None:
    jobs = fleet({"a": 4, "b": 4})
    keep = dict.fromkeys(BLOCK, 1)
    strict = replace(jobs[0].assignment, penalty=Penalty(0.3, keep))
    penalised = [replace(one, assignment=strict) for one in jobs]
    alike = [replace(one, examples=jobs[0].examples, seed=1) for one in penalised]
    # Two clients with the same rows: the union's mean loss is that of one.
    (single,) = split(MODEL, alike[:1], [CutPoint(2)])
    for trained in split(MODEL, alike, [CutPoint(2)] * 2):
        assert_equal(trained.adapter, single.adapter, 1e-10)
    (own,) = split(MODEL, alike[:1], [CutPoint(2)], OWN)
    assert_equal(single.adapter, own.adapter)
    (without,) = split(MODEL, [replace(alike[0], assignment=jobs[0].assignment)], [CutPoint(2)])
    with pytest.raises(AssertionError):
        assert_equal(single.adapter, without.adapter, 1e-4)
    fixed = replace(jobs[0].assignment, train="b")
    for trained in split(MODEL, [replace(o, assignment=fixed) for o in jobs], [CutPoint(2)] * 2):
        assert all(torch.equal(d.a, fixed.start[s].a) for s, d in trained.adapter.items())


@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(3), CutPoint(1, 3)], ids=str)
def test_with_one_client_shared_is_own_but_for_the_clip(cut: CutPoint) -> None:
    def both(local: LocalTraining) -> list[Adapter]:
        jobs = fleet({"a": 9}, local)
        return [split(MODEL, jobs, [cut], how)[0].adapter for how in (SHARED, OWN)]

    assert_equal(*both(LOCAL))
    assert_equal(*both(replace(LOCAL, proximal=0.5, dropout=0.3)))
    with pytest.raises(AssertionError):  # two norms are clipped, not their common one
        assert_equal(*both(replace(LOCAL, clip=0.05)), 1e-6)


def test_shared_sites_are_the_same_for_all_and_client_parts_are_not() -> None:
    a, b, c = (one.adapter for one in split(MODEL, fleet(UNEQUAL), MIXED))
    top = [s for s in BLOCK if BLOCK[s] == 3]
    bottom = [s for s in BLOCK if BLOCK[s] == 0]
    assert a.restrict(top).hash() == b.restrict(top).hash() == c.restrict(top).hash()
    with pytest.raises(AssertionError):
        assert_equal(a.restrict(bottom), b.restrict(bottom), 1e-6)


@pytest.mark.parametrize("cuts", [[CutPoint(2)] * 4, [*MIXED, CutPoint(2)]], ids=["equal", "mixed"])
def test_the_cohort_does_not_matter(cuts: Sequence[CutPoint]) -> None:
    jobs = fleet({"a": 5, "b": 2, "c": 7, "d": 4}, replace(LOCAL, clip=0.05, dropout=0.3))
    together = split(MODEL, jobs, cuts, cohort=8)
    for cohort in (1, 3):
        for one, other in zip(together, split(MODEL, jobs, cuts, cohort=cohort), strict=True):
            assert_equal(one.adapter, other.adapter, 1e-10)
            assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-10)


def test_what_the_shared_set_has_not_is_refused() -> None:
    jobs = fleet({"a": 3, "b": 3})
    ranks = {s: 3 if BLOCK[s] == 3 else 2 for s in BLOCK}
    other = random_adapter(MODEL, ranks, seed=3)
    jobs[1] = replace(jobs[1], assignment=replace(jobs[1].assignment, start=other))
    with pytest.raises(RankError, match=r"client 'b': at .*it has rank 3, another.*rank 2"):
        split(MODEL, jobs, [CutPoint(2)] * 2)
    # The same ranks and other factors, another scale, another frozen term: none is one adapter.
    one = fleet({"a": 3, "b": 3})
    assigned = one[0].assignment
    for changed in (
        replace(assigned, start=random_adapter(MODEL, 2, seed=4)),
        replace(assigned, scale=dict.fromkeys(BLOCK, 4.0)),
        replace(assigned, frozen=random_adapter(MODEL, 1, seed=4)),
    ):
        with pytest.raises(RankError, match="client 'b'"):
            split(MODEL, [one[0], replace(one[1], assignment=changed)], [CutPoint(2)] * 2)


def test_client_parts_of_a_shared_set_may_have_unequal_ranks() -> None:
    """Only what is behind every cut must be the same."""
    jobs = fleet({"a": 3, "b": 3})
    same = random_adapter(MODEL, 2, seed=3)
    higher = random_adapter(MODEL, 4, seed=8)
    mixed = Adapter({s: higher[s] if BLOCK[s] == 0 else same[s] for s in BLOCK})
    jobs[1] = replace(jobs[1], assignment=replace(jobs[1].assignment, start=mixed))
    trained = split(MODEL, jobs, [CutPoint(1)] * 2)
    assert [set(one.adapter.ranks.values()) for one in trained] == [{2}, {2, 4}]


@pytest.mark.parametrize("rule", ["hetlora", "flora:keep"])
def test_rules_that_deal_each_client_its_own_are_refused_before_any_training(rule: str) -> None:
    rules = {"hetlora": HetLoRA(), "flora:keep": FLoRA(reinitialise=False)}
    fleet = Fleet.table({"a": "T1", "b": "T1"}, types=types(2, 2), cuts={"T1": CutPoint(1)})
    with pytest.raises(RuleError, match=r"split\.adapters = 'shared' and the rule .* exclude"):
        preflight.check_cuts(MODEL, fleet, rules[rule], SHARED)
    preflight.check_cuts(MODEL, fleet, rules[rule], OWN)


def types(low: int, high: int) -> dict[str, LoRAType]:
    return {"T1": LoRAType("T1", {"all": low}), "T2": LoRAType("T2", {"all": high})}


def test_unequal_ranks_behind_the_cut_are_refused_before_any_training() -> None:
    cuts = {"T1": CutPoint(1), "T2": CutPoint(2)}
    fleet = Fleet.table({"a": "T1", "b": "T2"}, types=types(2, 3), cuts=cuts)
    with pytest.raises(RankError, match="Give both the same ranks"):
        preflight.check_cuts(MODEL, fleet, FLoRA(), SHARED)
    preflight.check_cuts(MODEL, fleet, FLoRA(), OWN)


# --- clients that come to grief ---


def test_a_client_that_diverges_leaves_and_the_shared_set_stays_finite() -> None:
    """Its activations are finite, and what the server part makes of them is not."""
    model = model_of_three("opt")
    jobs = [server_job(model, name, local=BY_HAND) for name in "abc"]
    jobs = [replace(one, seed=i) for i, one in enumerate(jobs, start=1)]
    sent = {one.client: requests_of(model, one) for one in jobs}
    bad = replace(sent["a"][0], states=sent["a"][0].states * 1e300)
    with (
        ServerParts(model, jobs, shared=True) as server_parts,
        ServerParts(model, jobs[1:], shared=True) as others,
    ):
        refused, *good = server_parts.answer([bad, sent["b"][0], sent["c"][0]])
        assert "not finite; nothing of it was applied" in refusal(refused)
        assert all(isinstance(one, Returned) for one in good)
        served(others, sent["b"][0], sent["c"][0])
        for pair in list(zip(sent["b"], sent["c"], strict=True))[1:]:
            served(server_parts, *pair)
            served(others, *pair)
        assert_equal(server_parts.adapter("b"), others.adapter("b"))


def test_in_a_u_shape_too() -> None:
    model = model_of_three("opt")
    jobs = [server_job(model, name, BENT, local=BY_HAND) for name in "abc"]
    jobs = [replace(one, seed=i) for i, one in enumerate(jobs, start=1)]
    sent = {one.client: requests_of(model, one) for one in jobs}
    bad = [
        replace(sent["a"][0], states=sent["a"][0].states * 1e300),
        replace(sent["b"][2], states=sent["b"][2].states.clone().fill_(1e308)),
    ]
    with (
        ServerParts(model, jobs, shared=True) as server_parts,
        ServerParts(model, jobs[2:], shared=True) as others,
    ):
        refused, *_ = server_parts.answer([bad[0], sent["b"][0], sent["c"][0]])
        assert "not finite" in refusal(refused)
        served(server_parts, sent["b"][1], sent["c"][1])
        refused, _ = server_parts.answer([bad[1], sent["c"][2]])
        assert "not finite" in refusal(refused)
        for request in sent["c"][3:]:
            served(server_parts, request)
        for request in sent["c"]:
            served(others, request)
        assert_equal(server_parts.adapter("c"), others.adapter("c"))


def test_the_step_waits_for_all_working_clients() -> None:
    model = model_of_three()
    jobs = [replace(server_job(model, n), seed=i) for i, n in enumerate("ab", start=1)]
    mine, its = (requests_of(model, one) for one in jobs)
    with (
        ServerParts(model, jobs, shared=True) as server_parts,
        ServerParts(model, jobs, shared=True) as others,
    ):
        for i in (0, 1):
            served(server_parts, mine[i], its[i])
            served(others, mine[i], its[i])
        assert server_parts.answer([mine[2]]) == [None]
        assert server_parts.answer([mine[2]]) == [None]
        for i in range(2, 6):
            served(server_parts, mine[i], its[i])
            served(others, mine[i], its[i])
        assert server_parts.adapter("a").hash() == others.adapter("a").hash()


def test_a_client_that_leaves_is_not_waited_for_and_its_gradients_stay() -> None:
    model = model_of_three()
    jobs = [replace(server_job(model, n), seed=i) for i, n in enumerate("ab", start=1)]
    mine, its = (requests_of(model, one) for one in jobs)
    with (
        ServerParts(model, jobs, shared=True) as server_parts,
        ServerParts(model, jobs, shared=True) as others,
    ):
        for each in (server_parts, others):
            for i in (0, 1):
                served(each, mine[i], its[i])
        server_parts.leave("a")
        served(server_parts, its[2])
        served(others, mine[2], its[2])
        others.leave("a")
        for request in its[3:]:
            served(server_parts, request)
            served(others, request)
        assert server_parts.adapter("b").hash() == others.adapter("b").hash()


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
def test_a_client_that_leaves_in_mid_step_counts_with_the_gradients_that_came(
    cut: CutPoint,
) -> None:
    """As if the client's step had been that much shorter, whatever its weight had announced."""
    model = model_of_three()
    local = replace(BY_HAND, steps=1)
    jobs = [replace(server_job(model, n, cut, local=local), seed=i) for i, n in enumerate("ab")]
    mine, its = (requests_of(model, one) for one in jobs)
    first = [one for one in its[:-1] if one.id.micro == 0]
    first[0] = replace(first[0], weight=1 / 20)
    tokens = len(first[0].states)  # Of a U-shape no more than these can count.
    assert tokens < 20
    with (
        ServerParts(model, jobs, shared=True) as server_parts,
        ServerParts(model, jobs, shared=True) as others,
    ):
        for request in [*mine[:-1], *first]:
            served(server_parts, request)
        server_parts.leave("b")
        served(server_parts, mine[-1])
        for request in mine[:-1]:
            served(others, request)
        shorter = [replace(first[0], weight=1 / tokens)]
        shorter += [replace(one, states=one.states * 20 / tokens) for one in first[1:]]
        for request in shorter:
            served(others, replace(request, last=True))
        served(others, mine[-1], its[-1])
        assert_equal(server_parts.adapter("a"), others.adapter("a"))


def test_a_client_cannot_claim_a_weight_in_the_shared_set() -> None:
    """What it says scales its own gradient; its labels are counted here."""
    model = model_of_three()
    local = replace(BY_HAND, steps=1)
    jobs = [replace(server_job(model, n, local=local), seed=i) for i, n in enumerate("ab")]
    mine, its = (requests_of(model, one) for one in jobs)
    found = []
    for factor in (1.0, 1e6):
        with ServerParts(model, jobs, shared=True) as server_parts:
            told = [replace(one, weight=one.weight * factor) for one in its[:-1]]
            for good, beside in zip(mine[:-1], told, strict=True):
                reply, other = served(server_parts, good, beside)
                found.append((reply.states, other.states / factor))
            served(server_parts, mine[-1], its[-1])
            found.append(server_parts.adapter("a"))
    *first, one, other = *found[:2], found[2], found[5]
    assert_equal(one, other)
    for states, again in zip(first, found[3:5], strict=True):
        for each, same in zip(states, again, strict=True):
            torch.testing.assert_close(each, same)


def test_a_gradient_of_the_shared_set_that_overflows_spoils_nothing() -> None:
    """B = 0 keeps what is returned finite, and A is so large that B's gradient is not."""
    model = model_of_three("opt")
    jobs = [server_job(model, name, BENT) for name in "ab"]
    start = Adapter({s: LowRank(d.b * 0, d.a * 1e100) for s, d in jobs[0].assignment.start.items()})
    jobs = [replace(j, assignment=replace(j.assignment, start=start, penalty=None)) for j in jobs]
    mine, its = (requests_of(model, one) for one in jobs)
    bad = replace(mine[2], states=mine[2].states * 1e250)
    with ServerParts(model, jobs, shared=True) as server_parts:
        for i in (0, 1):
            served(server_parts, mine[i], its[i])
        refused, good = server_parts.answer([bad, its[2]])
        assert "its gradient, is not finite" in refusal(refused)
        assert isinstance(good, Returned)
        served(server_parts, its[3])
        served(server_parts, its[4])


def test_clients_that_are_not_trained_alike_share_no_adapter() -> None:
    one, other = (server_job(MODEL, name) for name in "ab")
    for changed in (
        replace(other, local=replace(other.local, lr=0.5)),
        replace(other, assignment=replace(other.assignment, train="b")),
        replace(other, assignment=replace(other.assignment, penalty=None)),
    ):
        with pytest.raises(RankError, match=r"client 'b': .*in another way than the clients"):
            ServerParts(MODEL, [one, changed], shared=True)


@pytest.mark.parametrize(("b", "a"), [(float("inf"), 1.0), (0.0, 1e200)], ids=["sent", "back"])
def test_a_client_whose_client_part_diverges_ends_and_the_others_go_on(b: float, a: float) -> None:
    """In what it would send, or in its own gradient: then the others must not wait for its step."""
    jobs = fleet({"a": 4, "b": 4, "c": 4})
    infinite = Adapter(
        {
            s: LowRank(d.b * b, d.a * a) if BLOCK[s] == 0 else d
            for s, d in jobs[1].assignment.start.items()
        }
    )
    cut = [CutPoint(1)] * 3
    jobs[1] = replace(jobs[1], assignment=replace(jobs[1].assignment, start=infinite))
    first, failed, third = split(MODEL, jobs, cut)
    assert failed.failure is not None
    assert re.search("finite|norm inf", failed.failure)
    assert (first.failure, third.failure) == (None, None)
    if a == 1.0:  # nothing of it has reached the shared set
        without = split(MODEL, [jobs[0], jobs[2]], cut[:2])
        for one, other in zip((first, third), without, strict=True):
            assert_equal(one.adapter, other.adapter, 1e-10)


@pytest.mark.parametrize(
    "cuts", [[CutPoint(2), CutPoint(1), CutPoint(1)], [CutPoint(1, 3), CutPoint(1), CutPoint(2)]]
)
def test_a_client_part_that_fails_does_not_act_in_the_server_parts_of_other_cuts(
    cuts: Sequence[CutPoint],
) -> None:
    """Its blocks, with its factors attached, are run for those who are cut before them."""
    jobs = fleet({"a": 4, "b": 4, "c": 4})
    infinite = Adapter(
        {
            s: LowRank(d.b * float("inf"), d.a) if BLOCK[s] == 0 else d
            for s, d in jobs[0].assignment.start.items()
        }
    )
    jobs[0] = replace(jobs[0], assignment=replace(jobs[0].assignment, start=infinite))
    failed, *rest = split(MODEL, jobs, cuts)
    assert failed.failure is not None
    for one, other in zip(rest, split(MODEL, jobs[1:], cuts[1:]), strict=True):
        assert_equal(one.adapter, other.adapter, 1e-10)
