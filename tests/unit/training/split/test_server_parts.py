"""The server's end against clients driven by hand: what it refuses, repeats, and keeps apart."""

import functools
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import (
    BENT,
    LOCAL,
    STRAIGHT,
    alone,
    assert_equal,
    assert_same_reply,
    model_of_three,
    refusal,
    requests_of,
    served,
    server_job,
)
from models import VOCABULARY
from polyrank.algebra import Adapter, Dense, LowRank
from polyrank.errors import FrameError, ModelError, RankError, SiteError
from polyrank.planning import CutPoint
from polyrank.training.split import (
    Activations,
    Gradients,
    Refused,
    Reply,
    Request,
    Returned,
    ServerParts,
    Step,
    Stepped,
)

NAN, INFINITY = float("nan"), float("inf")
MODEL = model_of_three()
CONTEXT, WIDTH = MODEL.spec.context, MODEL.spec.hidden


def job(client: str = "a", cut: CutPoint = STRAIGHT, seed: int = 1, **options: object):
    return server_job(MODEL, client, cut, seed=seed, **options)


def labelled(label: int | Sequence[int]) -> Callable[[Activations], Request]:
    """Change the first label, or all of them."""

    def change(good: Activations) -> Request:
        labels = good.labels.clone()
        if isinstance(label, int):
            labels[0] = label
        else:
            labels[:] = label[0]
        return replace(good, labels=labels)

    return change


def at(**changes: object) -> Callable[[Request], Request]:
    return lambda good: replace(good, id=replace(good.id, **changes))


def with_state(value: float) -> Callable[[Request], Request]:
    def change(good: Request) -> Request:
        states = good.states.clone()
        states[-1, -1] = value
        return replace(good, states=states)

    return change


def changed(**changes: object) -> Callable[[Request], Request]:
    return lambda good: replace(good, **changes)


def states(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Request], Request]:
    return lambda good: replace(good, states=change(good.states))


# The requests of a straight client: 0, 1 activations, 2 step, 3, 4 activations, 5 step;
# of one in a U-shape: 0, 1 activations, 2, 3 gradients, 4 step, 5, 6, 7, 8, 9.
ALWAYS = [
    ("another client", at(client="nobody"), "the server trains nothing for this client"),
    ("another round", at(round=4), "expected client 'a', round 3, attempt 0"),
    ("another attempt", at(attempt=1), "expected client 'a', round 3, attempt 0"),
    ("a later step", at(step=7), "expected a request of step"),
    ("a step below zero", at(step=-1), "expected a request of step"),
]
SENDING = [
    ("a skipped microbatch", at(micro=2), "expected microbatch|was the last of its step"),
    ("a microbatch below zero", at(micro=-1), "expected microbatch|was the last of its step"),
    ("narrow states", states(lambda x: x[:, 1:]), f"expected activations of .*×{WIDTH}"),
    ("too few rows", states(lambda x: x[1:]), "expected activations of "),
    ("too many rows", states(lambda x: torch.cat([x, x[:1]])), "expected activations of "),
    ("flat states", states(torch.flatten), "expected activations of "),
    ("whole numbers", states(lambda x: x.long()), r"real numbers, got .* of torch\.int64"),
    ("complex numbers", states(lambda x: x + 0j), r"real numbers, got .*complex"),
    ("NaN", with_state(NAN), "activations hold NaN or infinity"),
    ("infinity", with_state(-INFINITY), "activations hold NaN or infinity"),
    ("no rows", changed(lengths=()), r"expected rows of 1…\d+ tokens, got \[\]"),
    ("an empty row", lambda g: replace(g, lengths=(*g.lengths, 0)), "expected rows of 1…"),
    ("a row below zero", lambda g: replace(g, lengths=(*g.lengths, 3, -3)), "expected rows of 1…"),
    ("a row past the context", changed(lengths=(CONTEXT + 1,)), f"expected rows of 1…{CONTEXT}"),
    ("other lengths", lambda g: replace(g, lengths=(*g.lengths, 1)), "expected activations of "),
    ("too many rows at once", lambda g: replace(g, lengths=(1,) * 9), "expected at most 8 rows"),
    ("weight zero", changed(weight=0.0), "expected a loss weight above 0, got 0.0"),
    ("a negative weight", changed(weight=-0.25), "expected a loss weight above 0, got -0.25"),
    ("weight NaN", changed(weight=NAN), "expected a loss weight above 0, got nan"),
    ("weight infinite", changed(weight=INFINITY), "expected a loss weight above 0, got inf"),
]
LABELS = [
    ("no labels", changed(labels=None), "expected labels with the cut at 1"),
    ("few labels", lambda g: replace(g, labels=g.labels[1:]), "expected .* labels of torch.int64"),
    (
        "labels of 1×P",
        lambda g: replace(g, labels=g.labels[None]),
        r"labels of torch.int64, got \(",
    ),
    ("real labels", lambda g: replace(g, labels=g.labels.double()), "got .*of torch.float64"),
    ("short labels", lambda g: replace(g, labels=g.labels.int()), "got .*of torch.int32"),
    ("a label above", labelled(VOCABULARY), f"expected labels in 0…{VOCABULARY - 1}.*got 97"),
    ("a label of -1", labelled(-1), "expected labels in .*got -1"),
    ("a label of -2", labelled(-2), "expected labels in .*got -2"),
    ("a huge label", labelled(2**40), "expected labels in "),
    ("no loss at all", labelled([-100]), "expected at least one label"),
]
BACK = [
    ("gradients skipped", at(micro=2), "expected the gradients of microbatch"),
    ("gradients below zero", at(micro=-1), "expected the gradients of microbatch"),
    ("narrow gradients", states(lambda x: x[:, 1:]), "expected gradients of "),
    ("few gradients", states(lambda x: x[1:]), "expected gradients of "),
    ("whole gradients", states(lambda x: x.long()), "expected gradients of .*int64"),
    ("gradients NaN", with_state(NAN), "gradients hold NaN or infinity"),
    ("gradients infinite", with_state(INFINITY), "gradients hold NaN or infinity"),
    ("another last", lambda g: replace(g, last=not g.last), "said that it was"),
    ("activations instead", lambda g: Activations(g.id, True, 0.1, (2,), g.states[:2], None), ""),
]
STEPS = [
    ("a microbatch", at(micro=1), "expected microbatch 0 of a request for a step"),
    ("factor NaN", changed(factor=NAN), r"expected a clip factor in \[0, 1\], got nan"),
    ("a negative factor", changed(factor=-0.1), r"clip factor in \[0, 1\], got -0\.1"),
    ("a factor above 1", changed(factor=1.001), r"clip factor in \[0, 1\], got 1\.001"),
]
CASES = [
    *((STRAIGHT, i, case) for i in range(6) for case in ALWAYS),
    *((BENT, i, case) for i in (0, 2, 4) for case in ALWAYS),
    *((STRAIGHT, i, case) for i in (0, 1, 3) for case in [*SENDING, *LABELS]),
    *((BENT, i, case) for i in (0, 1) for case in SENDING),
    *((BENT, i, case) for i in (2, 3) for case in BACK),
    *((STRAIGHT, i, case) for i in (2, 5) for case in STEPS),
    (BENT, 0, ("labels in a U-shape", lambda g: labels_to(g), "expected no labels")),
    *(
        (cut, 0, ("targets never sent", changed(last=True, weight=0.05), "cannot hold as many"))
        for cut in (STRAIGHT, BENT)
    ),
    (STRAIGHT, 1, ("another weight", changed(weight=0.125), "expected the step's loss weight")),
    (
        STRAIGHT,
        1,
        (
            "an early step",
            lambda g: Step(replace(g.id, micro=0), 1.0),
            "comes after the last microbatch",
        ),
    ),
    (
        BENT,
        2,
        (
            "an early step",
            lambda g: Step(replace(g.id, micro=0), 1.0),
            "comes after the last microbatch",
        ),
    ),
    (
        BENT,
        3,
        (
            "an early step",
            lambda g: Step(replace(g.id, micro=0), 1.0),
            "comes after the last microbatch",
        ),
    ),
    (BENT, 0, ("gradients first", lambda g: gradients_to(g), "after its activations")),
    (
        BENT,
        1,
        ("gradients too early", lambda g: gradients_to(g), "expected the gradients of micro"),
    ),
    (STRAIGHT, 1, ("gradients", lambda g: gradients_to(g), "come back in a U-shape only")),
    (STRAIGHT, 2, ("one more", lambda g: more(g), "microbatch 1 was the last of its step")),
]


def labels_to(good: Activations) -> Request:
    return replace(good, labels=torch.zeros(len(good.states), dtype=torch.long))


def gradients_to(good: Activations) -> Request:
    return Gradients(good.id, good.last, good.states)


def more(good: Step) -> Request:
    one = requests_of(MODEL, job())[1]
    return replace(one, id=replace(good.id, micro=2))


@functools.cache
def undisturbed(cut: CutPoint, name: str, seed: int) -> tuple[list[Reply], Adapter]:
    """Return what a client is answered that is served alone, and its adapter."""
    one = job(name, cut, seed=seed)
    with ServerParts(MODEL, [one]) as server_parts:
        return served_one_by_one(server_parts, requests_of(MODEL, one)), server_parts.adapter(name)


@pytest.mark.parametrize(
    ("cut", "index", "case"),
    CASES,
    ids=[f"{case[0]} at {cut}, request {index}" for cut, index, case in CASES],
)
def test_a_bad_request_is_refused_and_changes_nothing(cut, index, case) -> None:
    _, spoil, expected = case
    one, other = job("a", cut, seed=1), job("b", cut, seed=2)
    mine, its = requests_of(MODEL, one), requests_of(MODEL, other)
    bad = spoil(mine[index])
    expected_replies, expected_adapter = undisturbed(cut, "b", 2)
    with ServerParts(MODEL, [one, other]) as server_parts:
        for i, (good, beside) in enumerate(zip(mine, its, strict=True)):
            if i == index:
                refused, reply = server_parts.answer([bad, beside])
                assert isinstance(refused, Refused)
                assert refused.id == bad.id
                assert str(bad.id) in refused.reason
                assert re.search(expected, refused.reason), refused.reason
                served(server_parts, good)
            else:
                reply = served(server_parts, good, beside)[1]
            assert_same_reply(reply, expected_replies[i], 1e-12)
        assert_equal(server_parts.adapter("a"), undisturbed(cut, "a", 1)[1])
        assert_equal(server_parts.adapter("b"), expected_adapter)


def test_the_clients_of_these_tests_do_train() -> None:
    """Else the comparisons above would hold whatever a request does."""
    for cut in (STRAIGHT, BENT):
        one = job("a", cut)
        with pytest.raises(AssertionError):
            assert_equal(alone(MODEL, one), one.assignment.start, 1e-6)


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
def test_a_repeated_request_is_answered_again_and_applied_once(cut: CutPoint) -> None:
    """Each as soon as it was answered, and at every later moment of the step."""
    jobs = [job("a", cut, seed=1), job("b", cut, seed=2)]
    pairs = list(zip(*(requests_of(MODEL, one) for one in jobs), strict=True))
    with ServerParts(MODEL, jobs) as server_parts, ServerParts(MODEL, jobs) as undisturbed:
        before: list[tuple[Request, Reply]] = []
        for good, beside in pairs:
            served(undisturbed, good, beside)
            first, _ = served(server_parts, good, beside)
            before = [] if isinstance(good, Step) else before
            before.append((good, first))
            for request, answer in before * 2:
                assert_same_reply(served(server_parts, request)[0], answer)
        for name in "ab":
            assert_equal(server_parts.adapter(name), undisturbed.adapter(name), 0.0)
        last = before[-1][0]
        assert served(server_parts, last) == [Stepped(last.id)]


@pytest.mark.parametrize(
    ("cut", "index", "change"),
    [
        (STRAIGHT, 0, changed(weight=0.5)),
        (STRAIGHT, 0, changed(weight=NAN)),
        (STRAIGHT, 0, changed(last=True)),
        (STRAIGHT, 0, changed(lengths=(3, 3))),
        (STRAIGHT, 0, states(lambda x: x[1:])),
        (STRAIGHT, 0, states(lambda x: x[0, 0])),
        (BENT, 0, changed(weight=0.5)),
        (BENT, 2, changed(last=True)),
        (BENT, 2, states(lambda x: x[1:])),
        (STRAIGHT, 2, changed(factor=0.5)),
        (STRAIGHT, 5, changed(factor=0.25)),
        (STRAIGHT, 5, changed(factor=NAN)),
        (BENT, 4, changed(factor=0.5)),
    ],
)
def test_a_repetition_that_says_something_else_is_refused(cut, index, change) -> None:
    one = job("a", cut)
    requests = requests_of(MODEL, one)
    with ServerParts(MODEL, [one]) as server_parts:
        for i, request in enumerate(requests):
            served(server_parts, request)
            if i == index:
                assert "already" in refusal(server_parts.answer([change(request)])[0])
                served(server_parts, request)
        assert_equal(server_parts.adapter("a"), alone(MODEL, one), 0.0)


@pytest.mark.parametrize("step", [0, 2])
def test_a_request_of_another_step_is_no_repetition(step: int) -> None:
    """Though one of that number was answered in this step."""
    one = job("a")
    requests = requests_of(MODEL, one)
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, requests[:4])
        assert "request of step 1" in refusal(server_parts.answer([at(step=step)(requests[3])])[0])


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
def test_after_the_last_step_nothing_more_is_served(cut: CutPoint) -> None:
    one = job("a", cut)
    requests = requests_of(MODEL, one)
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, requests)
        finished = server_parts.adapter("a")
        late = [*requests[:-1], *(at(step=2)(each) for each in requests[-5:])]
        for request in late:
            assert "all 2 steps of this round are taken" in refusal(
                server_parts.answer([request])[0]
            )
        server_parts.leave("a")
        served(server_parts, requests[-1])
        assert_equal(server_parts.adapter("a"), finished, 0.0)


def served_one_by_one(server_parts: ServerParts, requests: Sequence[Request]) -> list[Reply]:
    return [served(server_parts, request)[0] for request in requests]


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_client_that_has_left_is_served_no_more(cut: CutPoint, count: int) -> None:
    one, other = job("a", cut, seed=1), job("b", cut, seed=2)
    mine, its = requests_of(MODEL, one), requests_of(MODEL, other)
    with ServerParts(MODEL, [one, other]) as server_parts:
        for good, beside in zip(mine[:count], its[:count], strict=True):
            served(server_parts, good, beside)
        server_parts.leave("a")
        server_parts.leave("nobody")
        for i in range(count, len(its)):
            refused, _ = server_parts.answer([mine[i], its[i]])
            assert "has left" in refusal(refused)
            for earlier in mine[:count]:
                assert "has left" in refusal(server_parts.answer([earlier])[0])
        with pytest.raises(
            FrameError, match=r"'a': the server took \d of 2 steps for it and it has left"
        ):
            server_parts.adapter("a")
        assert_equal(server_parts.adapter("b"), alone(MODEL, other))


def test_there_is_no_adapter_before_the_last_step() -> None:
    one = job("a")
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, requests_of(MODEL, one)[:-1])
        with pytest.raises(FrameError, match="took 1 of 2 steps for it; it has no update"):
            server_parts.adapter("a")


@pytest.mark.parametrize("index", [0, 2])
def test_two_requests_of_one_client_at_once_are_not_served_twice(index: int) -> None:
    one = job("a")
    requests = requests_of(MODEL, one)
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, requests[:index])
        first, second = server_parts.answer([requests[index], requests[index]])
        assert not isinstance(first, Refused)
        assert "one request of a client at a time" in refusal(second)
        served_one_by_one(server_parts, requests[index + 1 :])
        assert_equal(server_parts.adapter("a"), alone(MODEL, one), 0.0)


def test_answers_come_in_the_order_of_the_requests() -> None:
    """Of clients at different points, some refused, some repeating."""
    jobs = [job(name, seed=i) for i, name in enumerate("abcd")]
    sent = [requests_of(MODEL, one) for one in jobs]
    with ServerParts(MODEL, jobs) as server_parts:
        served_one_by_one(server_parts, [*sent[0][:2], *sent[1][:1], *sent[2][:2]])
        asked = [sent[3][1], sent[0][2], sent[1][0], sent[2][1], sent[3][0]]
        replies = server_parts.answer(asked[:4])
        assert [reply.id for reply in replies] == [request.id for request in asked[:4]]
        assert [type(reply) for reply in replies] == [Refused, Stepped, Returned, Returned]


def test_what_a_client_says_does_not_depend_on_who_is_served_with_it() -> None:
    jobs = [job(name, seed=i, rank=i) for i, name in enumerate("abc", start=1)]
    sent = [requests_of(MODEL, one) for one in jobs]
    with ServerParts(MODEL, jobs) as server_parts:
        for requests in zip(*sent, strict=True):
            served(server_parts, *requests)
        for one in jobs:
            assert_equal(server_parts.adapter(one.client), alone(MODEL, one))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", ["abc", "cab"])
def test_gradients_may_come_one_by_one_though_activations_came_together(
    checkpointing: bool, order: str
) -> None:
    """Even if a client is steps ahead of another whose gradients are yet to come."""
    model = model_of_three(checkpointing=checkpointing)
    jobs = {name: job(name, BENT, seed=i, rank=i) for i, name in enumerate("abc", start=1)}
    sent = {name: requests_of(MODEL, one) for name, one in jobs.items()}
    with ServerParts(model, list(jobs.values())) as server_parts:
        for i in (0, 1):
            served(server_parts, *(sent[name][i] for name in jobs))
        for name in order:
            served_one_by_one(server_parts, sent[name][2:])
        for name, one in jobs.items():
            assert_equal(server_parts.adapter(name), alone(MODEL, one))


def test_one_client_of_a_pass_may_leave_before_its_gradients() -> None:
    jobs = {name: job(name, BENT, seed=i) for i, name in enumerate("abc", start=1)}
    sent = {name: requests_of(MODEL, one) for name, one in jobs.items()}
    with ServerParts(MODEL, list(jobs.values())) as server_parts:
        for i in (0, 1):
            served(server_parts, *(sent[name][i] for name in jobs))
        served(server_parts, sent["a"][2])
        server_parts.leave("b")
        served_one_by_one(server_parts, [*sent["c"][2:], *sent["a"][3:]])
        for name in "ac":
            assert_equal(server_parts.adapter(name), alone(MODEL, jobs[name]))


def spoiled(value: float, **options: object):
    """Return a job whose frozen term is not finite, or not for long."""
    one = job("a", frozen=1, **options)
    frozen = Adapter(
        {site: LowRank(delta.b * value, delta.a) for site, delta in one.assignment.frozen.items()}
    )
    return replace(one, assignment=replace(one.assignment, frozen=frozen))


@pytest.mark.parametrize("value", [INFINITY, 1e200])
@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
def test_a_client_whose_numbers_overflow_is_refused_and_the_others_go_on(
    cut: CutPoint, value: float
) -> None:
    one, other = spoiled(value, cut=cut), job("b", cut, seed=2)
    mine, its = requests_of(MODEL, one), requests_of(MODEL, other)
    with ServerParts(MODEL, [one, other]) as server_parts:
        reply, beside = server_parts.answer([mine[0], its[0]])
        assert "not finite; nothing of it was applied. Lower local.lr" in refusal(reply)
        assert str(mine[0].id) in refusal(reply)
        assert isinstance(beside, Returned)
        for request in its[1:]:
            refused, _ = server_parts.answer([mine[1], request])
            assert "has left" in refusal(refused)
        assert_equal(server_parts.adapter("b"), alone(MODEL, other))


def test_a_gradient_whose_norm_overflows_is_refused_in_time() -> None:
    """Loss and states are finite here, and yet no step could be taken with such numbers."""
    model = model_of_three("opt")
    one, other = (server_job(model, name, seed=i) for i, name in enumerate("ab"))
    mine = [replace(r, weight=1e200) for r in requests_of(model, one)[:2]]
    its = requests_of(model, other)
    with ServerParts(model, [one, other]) as server_parts:
        served(server_parts, mine[0], its[0])
        refused, _ = server_parts.answer([mine[1], its[1]])
        assert "squared norm inf of the gradient is not finite" in refusal(refused)
        served_one_by_one(server_parts, its[2:])
        assert_equal(server_parts.adapter("b"), alone(model, other))


def test_a_rate_that_is_far_too_high_ends_in_a_refusal() -> None:
    local = replace(LOCAL, lr=1e160, steps=3)
    one, other = job("a", local=local), job("b", seed=2)
    mine, its = requests_of(MODEL, one), requests_of(MODEL, other)
    with ServerParts(MODEL, [one, other]) as server_parts:
        for i in range(3):
            served(server_parts, mine[i], its[i])
        refused, _ = server_parts.answer([mine[3], its[3]])
        assert "not finite" in refusal(refused)
        served_one_by_one(server_parts, its[4:])
        assert_equal(server_parts.adapter("b"), alone(MODEL, other))


def test_nothing_acts_on_the_model_between_calls_and_after() -> None:
    one = job("a", frozen=1)
    merged = Adapter(
        {s: Dense(torch.ones(MODEL.spec.shapes[s]).double()) for s in one.assignment.start}
    )
    summed = replace(one, assignment=replace(one.assignment, merged=merged))
    ids = torch.arange(4, 12)[None]
    plain = MODEL.module(input_ids=ids).logits
    with ServerParts(MODEL, [one]) as server_parts:
        assert torch.equal(MODEL.module(input_ids=ids).logits, plain)
        for request in requests_of(MODEL, one):
            served(server_parts, request)
            assert torch.equal(MODEL.module(input_ids=ids).logits, plain)
    with ServerParts(MODEL, [summed]):
        assert not torch.equal(MODEL.module(input_ids=ids).logits, plain)
    assert torch.equal(MODEL.module(input_ids=ids).logits, plain)


def test_the_states_of_a_request_are_neither_kept_nor_changed() -> None:
    one = job("a", BENT)
    requests = requests_of(MODEL, one)
    kept = [getattr(request, "states", torch.zeros(0)).clone() for request in requests]
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, requests)
    for request, before in zip(requests, kept, strict=True):
        states = getattr(request, "states", torch.zeros(0))
        assert torch.equal(states, before)
        assert not states.requires_grad


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_no_graph_of_a_finished_step_is_kept(cut: CutPoint, shared: bool) -> None:
    """Nor one of a client that has left. Those of middles that wait are kept, and seen here."""

    def graphs() -> int:
        gc.collect()
        found = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        return sum(one.grad_fn is not None for one in found)

    one, other = job("a", cut), replace(job("b", cut), seed=2)
    mine, its = requests_of(MODEL, one), requests_of(MODEL, other)
    before = graphs()
    with ServerParts(MODEL, [one, other], shared=shared) as server_parts:
        step = next(i for i, each in enumerate(mine) if isinstance(each, Step))
        for good, beside in zip(mine[: step + 1], its, strict=False):
            served(server_parts, good, beside)
        assert graphs() == before
        served(server_parts, mine[step + 1], its[step + 1])
        assert (graphs() > before) == (cut == BENT)
        server_parts.leave("a")
        server_parts.leave("b")
        assert graphs() == before


@pytest.mark.parametrize("cut", [STRAIGHT, BENT], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_the_memory_of_a_request_is_let_go_at_once(cut: CutPoint, shared: bool) -> None:
    one = job("a", cut)
    first = requests_of(MODEL, one)[0]
    array = first.states.numpy().copy()
    memory = weakref.ref(array)
    request = replace(first, states=torch.from_numpy(array))
    with ServerParts(MODEL, [one], shared=shared) as server_parts:
        served(server_parts, request)
        del array, request
        gc.collect()
        assert memory() is None


def test_states_that_carry_a_graph_are_taken_as_numbers() -> None:
    one = job("a")
    requests = requests_of(MODEL, one)
    attached = [
        replace(r, states=r.states.clone().requires_grad_() * 1.0)
        if r.id and not isinstance(r, Step)
        else r
        for r in requests
    ]
    with ServerParts(MODEL, [one]) as server_parts:
        served_one_by_one(server_parts, attached)
        assert_equal(server_parts.adapter("a"), alone(MODEL, one), 0.0)


def test_server_parts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ModelError, match=r"expected clients of one cut, got \['1', '2'\]"):
        ServerParts(MODEL, [job("a"), job("b", CutPoint(2))])
    with pytest.raises(ModelError, match=r"expected clients of one cut, got \[\]"):
        ServerParts(MODEL, [])
    with pytest.raises(ModelError, match=r"one job of a client, got several of \['a'\]"):
        ServerParts(MODEL, [job("a"), job("b"), job("a", seed=2)])
    with pytest.raises(ModelError, match="cut"):
        ServerParts(MODEL, [replace(job("a"), cut=CutPoint(3))])
    with pytest.raises(RankError, match="rank"):
        ServerParts(MODEL, [job("a"), job("b", rank=3)], shared=True)


def test_one_server_holds_one_base() -> None:
    one, other = job("a"), job("b")
    site = next(iter(one.assignment.start))
    matrix = torch.ones(MODEL.spec.shapes[site], dtype=torch.float64)

    def merged(by: float):
        return replace(
            other, assignment=replace(other.assignment, merged=Adapter({site: Dense(matrix * by)}))
        )

    ServerParts(MODEL, [replace(merged(1.0), client="a"), merged(1.0)])
    with pytest.raises(SiteError, match="client 'b': other sums are merged into the base at"):
        ServerParts(MODEL, [replace(merged(1.0), client="a"), merged(2.0)])
    for jobs in ([one, merged(1.0)], [merged(1.0), one]):
        with pytest.raises(SiteError, match="client 'a': other sums are merged into the base at"):
            ServerParts(MODEL, jobs)


# --- any order ---

JUNK: list[Callable[[Request], Request]] = [
    at(round=9),
    at(step=5),
    at(micro=5),
    at(client="nobody"),
    lambda good: replace(good, states=good.states * NAN) if hasattr(good, "states") else good,
    lambda good: Step(at(step=good.id.step + 1)(good).id, 0.5),
    lambda good: Step(good.id, 2.0),
    lambda good: Activations(good.id, True, -1.0, (1,), torch.zeros(1, WIDTH), None),
]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), cut=st.sampled_from([STRAIGHT, BENT]), names=st.sampled_from(["ab", "abc"]))
def test_repetitions_and_junk_in_any_order_change_nothing(data, cut: CutPoint, names: str) -> None:
    jobs = [job(name, cut, seed=i) for i, name in enumerate(names, start=1)]
    left = {one.client: requests_of(MODEL, one) for one in jobs}
    had: dict[str, list[tuple[Request, Reply]]] = {name: [] for name in names}
    action = st.sampled_from(["next", "next", "repeat", "junk", "nothing"])
    with ServerParts(MODEL, jobs) as server_parts:
        for _ in range(data.draw(st.integers(0, 25))):
            asked: list[tuple[str, str, Request, Reply | None]] = []
            for name in names:
                what = data.draw(action)
                if what == "repeat" and had[name]:
                    asked.append((name, what, *data.draw(st.sampled_from(had[name]))))
                elif what == "next" and left[name]:
                    asked.append((name, what, left[name][0], None))
                elif what == "junk" and left[name]:
                    bad = data.draw(st.sampled_from(JUNK))(left[name][0])
                    if bad is not left[name][0]:
                        asked.append((name, what, bad, None))
            replies = server_parts.answer([request for _, _, request, _ in asked])
            for (name, what, request, before), reply in zip(asked, replies, strict=True):
                assert reply.id == request.id
                if what == "junk":
                    assert isinstance(reply, Refused)
                elif what == "repeat":
                    assert before is not None
                    assert_same_reply(reply, before)
                else:
                    assert not isinstance(reply, Refused)
                    left[name].pop(0)
                    had[name] = [] if isinstance(request, Step) else had[name]
                    had[name].append((request, reply))
        for name in names:
            served_one_by_one(server_parts, left[name])
        for seed, name in enumerate(names, start=1):
            assert_equal(server_parts.adapter(name), undisturbed(cut, name, seed)[1])


@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 2)])
def test_a_step_has_no_more_microbatches_than_were_agreed(cut):
    """What is kept of a client that never steps has a bound."""
    model = model_of_three()
    one = server_job(model, "a", cut)
    first = replace(requests_of(model, one)[0], last=False)
    with ServerParts(model, [one]) as server_parts:
        for micro in range(one.local.accumulation):
            (reply,) = server_parts.answer([replace(first, id=replace(first.id, micro=micro))])
            assert isinstance(reply, Returned)
        over = replace(first.id, micro=one.local.accumulation)
        (reply,) = server_parts.answer([replace(first, id=over)])
        assert isinstance(reply, Refused)
        assert f"at most {one.local.accumulation} microbatches in a step" in reply.reason
