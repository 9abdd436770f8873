"""The clients' end against links that fail: who meets it ends and says why, the others go on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from by_hand import assert_equal, model_of_three
from jobs import job
from polyrank.errors import FrameError
from polyrank.planning import CutPoint
from polyrank.planning.traffic import WireBytes
from polyrank.training import LocalTraining, Trained
from polyrank.training.split import (
    Activations,
    Gradients,
    Link,
    PendingReply,
    Request,
    Returned,
    ServerPart,
    SplitJob,
    SplitSettings,
    Step,
    Stepped,
    train_split,
)
from polyrank.transport import InProcessLinks

MODEL = model_of_three("opt")
LOCAL = LocalTraining(epochs=1, batch=2, accumulation=2, lr=1e-2, clip=0.05)
Spoil = Callable[[Request, Returned | Stepped], Returned | Stepped]


class Faulty:
    """A link that goes wrong at one request: when it is sent, or in what comes back."""

    def __init__(self, link: Link, when: Callable[[Request], bool], spoil: Spoil | None):
        self.link, self.when, self.spoil = link, when, spoil
        self.closed = 0

    def submit(self, request: Request) -> PendingReply:
        if not self.when(request):
            return self.link.submit(request)
        if self.spoil is None:
            raise FrameError(f"{request.id}: the line is dead")
        return Late(self.link.submit(request), request, self.spoil)

    @property
    def traffic(self) -> WireBytes:
        return self.link.traffic

    def close(self) -> None:
        self.closed += 1
        self.link.close()


class Late:
    def __init__(self, pending: PendingReply, request: Request, spoil: Spoil):
        self.pending, self.request, self.spoil = pending, request, spoil

    def result(self) -> Returned | Stepped:
        return self.spoil(self.request, self.pending.result())


def split(
    names: str,
    cut: CutPoint,
    *,
    faulty: str = "",
    when=None,
    spoil=None,
    adapters: str = "own",
    in_flight: int | None = None,
) -> tuple[dict[str, Trained], dict[str, Link]]:
    how, local = SplitSettings(wire="float64", adapters=adapters), LOCAL
    if in_flight is not None:
        how = replace(how, in_flight=in_flight)
        local = replace(LOCAL, batch=1, accumulation=4)
    links: dict[str, Link] = {}

    def connect(server_part: ServerPart):
        many = InProcessLinks(server_part, "float64", MODEL.spec.hidden, 4096)

        def link(client: str) -> Link:
            made = many.link(client)
            links[client] = Faulty(made, when, spoil) if client == faulty else made
            return links[client]

        return link

    seeds = {"a": 1, "b": 2, "c": 3}
    same = job(MODEL, "a").assignment
    jobs = [
        replace(job(MODEL, name, count=9, seed=seeds[name], local=local), assignment=same)
        for name in names
    ]
    found = train_split(MODEL, [SplitJob(j, cut, 1) for j in jobs], how, connect, cohort=8)
    return dict(zip(names, found, strict=True)), links


def fail(request: Request, _: Returned | Stepped) -> Returned:
    raise FrameError(f"{request.id}: nothing came back")


def returned(**changes: object) -> Spoil:
    return lambda _, reply: replace(reply, **changes)


def with_states(change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda _, reply: replace(reply, states=change(reply.states))


def with_nan(states: torch.Tensor) -> torch.Tensor:
    states = states.clone()
    states[1, 2] = float("nan")
    return states


def kind(what: type, step: int = 1, micro: int = 0) -> Callable[[Request], bool]:
    return lambda request: (
        isinstance(request, what) and (request.id.step, request.id.micro) == (step, micro)
    )


FAULTS = [
    ("cannot be sent", None, "the line is dead"),
    ("no answer", fail, "nothing came back"),
    ("NaN", with_states(with_nan), "what the server returned holds NaN"),
    ("fewer rows", with_states(lambda x: x[:-1]), r"expected \(\d+, 16\) numbers in return"),
    ("more rows", with_states(lambda x: torch.cat([x, x])), r"expected \(\d+, 16\) numbers"),
    ("narrow", with_states(lambda x: x[:, 1:]), r"got \(\d+, 15\)"),
    ("one number", with_states(lambda x: x.sum()), r"expected \(\d+, 16\) numbers .*got \(\)"),
    ("Stepped", lambda request, _: Stepped(request.id), "expected states in return, got Stepped"),
    (
        "another's",
        lambda request, reply: replace(reply, id=replace(request.id, micro=7)),
        "the answer to another request came",
    ),
    ("a norm below 0", returned(squared_norm=-1.0), "squared norm of 0 or more in return, got -1"),
    ("a norm that is none", returned(squared_norm=float("nan")), "squared norm of 0 or more"),
]
MOMENTS = [
    (CutPoint(1), kind(Activations)),
    (CutPoint(1), kind(Activations, 1, 1)),
    (CutPoint(1, 2), kind(Activations)),
    (CutPoint(1, 2), kind(Gradients)),
    (CutPoint(1, 2), kind(Gradients, 1, 1)),
]


@pytest.mark.parametrize("adapters", ["own", "shared"])
@pytest.mark.parametrize(("cut", "when"), MOMENTS)
@pytest.mark.parametrize(("spoil", "reason"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_client_whose_reply_fails_ends_and_the_others_go_on(
    cut, when, spoil, reason, adapters
) -> None:
    trained, links = split("abc", cut, faulty="b", when=when, spoil=spoil, adapters=adapters)
    assert trained["b"].failure is not None
    with pytest.raises(FrameError, match=f"(?s)client 'b', round 1.*{reason}"):
        raise FrameError(trained["b"].failure)
    assert links["b"].closed
    assert set(trained["b"].metrics) == {"wire_up", "wire_down"}
    assert (trained["a"].failure, trained["c"].failure) == (None, None)
    if adapters == "own":
        alone, _ = split("ac", cut)
        for name in "ac":
            assert_equal(trained[name].adapter, alone[name].adapter)
            assert trained[name].metrics["loss"] == pytest.approx(alone[name].metrics["loss"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (None, "the line is dead"),
        (fail, "nothing came back"),
        (
            lambda request, _: Returned(request.id, torch.zeros(1, 16)),
            "expected Stepped, got Returned",
        ),
    ],
)
@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 2)], ids=str)
def test_a_client_whose_step_fails_ends_and_the_others_go_on(
    cut: CutPoint, spoil, reason: str
) -> None:
    trained, _ = split("abc", cut, faulty="b", when=kind(Step, 1), spoil=spoil)
    assert reason in (trained["b"].failure or "")
    assert "client 'b', round 1, attempt 0, step 1" in (trained["b"].failure or "")
    alone, _ = split("ac", cut)
    for name in "ac":
        assert_equal(trained[name].adapter, alone[name].adapter)


@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 2)], ids=str)
def test_a_step_without_the_norm_of_the_server_part_is_not_taken(cut: CutPoint) -> None:
    """The common clip factor cannot be known without it."""
    last = Activations if cut.upper is None else Gradients
    when, spoil = kind(last, 1, 1), returned(squared_norm=None)
    trained, _ = split("abc", cut, faulty="b", when=when, spoil=spoil)
    assert "client 'b', round 1, attempt 0, step 1" in (trained["b"].failure or "")
    assert "the server gave no norm" in (trained["b"].failure or "")


def test_a_client_alone_may_fail_too() -> None:
    trained, _ = split("b", CutPoint(1), faulty="b", when=kind(Activations), spoil=fail)
    assert "nothing came back" in (trained["b"].failure or "")


@pytest.mark.parametrize("cut", [CutPoint(1), CutPoint(1, 2)], ids=str)
@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_as_many_microbatches_are_under_way_as_is_asked_for(cut: CutPoint, in_flight: int) -> None:
    """Four in a step: of a larger number all are."""
    waiting: set[int] = set()
    most = 0

    def sent(request: Request) -> bool:
        nonlocal most
        if isinstance(request, Activations):
            waiting.add(request.id.micro)
            most = max(most, len(waiting))
        return True

    def answered(request: Request, reply: Returned | Stepped) -> Returned | Stepped:
        if isinstance(request, Activations):
            waiting.remove(request.id.micro)
        return reply

    split("b", cut, faulty="b", when=sent, spoil=answered, in_flight=in_flight)
    assert most == min(in_flight, 4)
