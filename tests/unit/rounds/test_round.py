"""A round without I/O: what it accepts, what it refuses and says why, what it aggregates."""

from dataclasses import replace

import pytest
import torch

from polyrank.aggregation import FedIT, FleetSpec, FlexLoRA, FLoRA
from polyrank.algebra import Adapter
from polyrank.errors import RuleError, UpdateError
from polyrank.planning import CutPoint, Scaling
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.messages import Failure
from polyrank.rounds.round import Round
from polyrank.rounds.sampling import sample_clients
from round_samples import (
    WIRED,
    answer,
    begin,
    bytes_at,
    divided,
    metric,
    resized,
    settings,
    spoiled,
)

BAD = {
    "NaN in A": (spoiled(float("nan")), "NaN or infinite entries at q"),
    "NaN in B": (spoiled(float("nan"), "v", "b"), "NaN or infinite entries at v"),
    "infinite": (spoiled(float("-inf")), "NaN or infinite"),
    "one row more": (resized("q", 7, 5, 3), r"expected \(6, 5\) of rank 3"),
    "transposed": (resized("q", 5, 6, 3), r"expected \(6, 5\)"),
    "rank 1, which would broadcast": (resized("q", 6, 5, 1), "rank 3, got .* of rank 1"),
    "a larger rank": (resized("q", 6, 5, 4), "of rank 4"),
    "a site too many": (resized("k", 6, 5, 1), r"not asked for \['k'\]"),
    "a site missing": (
        lambda u: replace(u, adapter=u.adapter.restrict(["v"])),
        r"sites missing \['q'\]",
    ),
    "no site": (lambda u: replace(u, adapter=Adapter({})), "sites missing"),
    "integers": (
        lambda u: replace(u, adapter=u.adapter.to(dtype=torch.int32)),
        "expected real numbers",
    ),
    "other factors": (lambda u: replace(u, assignment="0" * 64), "other factors than were sent"),
    "no examples": (lambda u: replace(u, examples=0), "at least 1 training example, got 0"),
    "a loss that is NaN": (metric("loss", float("nan")), "finite number as 'loss'"),
    "no tokens told": (metric("tokens", None), "finite number as 'tokens'"),
    "no targets": (metric("target_tokens", 0.0), "at least 1 target token"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_update_is_refused_with_its_reason_and_never_aggregated(spoil, message):
    round = begin(clients=("a", "b"))
    round.accept(answer(round, "a"))
    before = {name: tensor.clone() for name, tensor in round.state.tensors.items()}
    with pytest.raises(UpdateError, match=message) as caught:
        round.accept(spoil(answer(round, "b")))
    assert "'b' in round 2" in str(caught.value)
    assert round.rejected == {"b": str(caught.value)}
    assert list(round.accepted) == ["a"]
    read = []
    round.aggregate(lambda client, site: read.append(client) or answer(round, "a").adapter[site])
    assert set(read) == {"a"}
    assert all(torch.equal(round.state.tensors[name], t) for name, t in before.items())


def test_an_unknown_client_is_refused_and_counts_for_nobody():
    round = begin(clients=("a", "b"))
    for stranger in ("c", "nobody"):
        with pytest.raises(UpdateError, match="not asked to take part"):
            round.accept(replace(answer(round, "a"), client=stranger))
    assert not round.accepted
    assert not round.rejected


def test_an_update_counts_once():
    round = begin()
    first = answer(round, "a")
    round.accept(first)
    with pytest.raises(UpdateError, match="was accepted already"):
        round.accept(first)
    assert list(round.accepted) == ["a"]
    assert not round.rejected


def test_a_good_update_after_a_bad_one_is_accepted():
    round = begin()
    with pytest.raises(UpdateError):
        round.accept(spoiled(float("nan"))(answer(round, "a")))
    round.accept(answer(round, "a"))
    assert (list(round.accepted), round.rejected) == (["a"], {})


def test_a_client_that_failed_is_counted_with_its_reason():
    round = begin()
    round.fail(Failure("a", 2, 0, "its loss was NaN"))
    assert round.rejected == {"a": "its loss was NaN"}
    with pytest.raises(UpdateError, match="not asked"):
        round.fail(Failure("x", 2, 0, "?"))


@pytest.mark.parametrize(("bound", "fits"), [(100.0, True), (1e-3, False)])
def test_the_increment_is_bounded_not_the_update(bound, fits):
    round = begin(settings(max_increment=bound))
    update = answer(round, "b")
    start = round.assignment("b").start
    norm = sum((update.adapter[s] - start[s]).norm() ** 2 for s in start) ** 0.5
    assert (norm <= bound) == fits
    if fits:
        round.accept(update)
    else:
        with pytest.raises(UpdateError, match=f"norm {norm:.4g}, more than max_increment"):
            round.accept(update)
    still = replace(update, adapter=start)
    round.accepted.clear()
    round.accept(still)  # No increment at all fits every bound, however large the update is.


def test_all_bytes_that_arrive_are_counted_and_all_that_are_sent():
    round = begin(clients=("a", "b"))
    round.accept(answer(round, "a"))
    with pytest.raises(UpdateError):
        round.accept(spoiled(float("nan"))(answer(round, "b")))
    # 4 bytes times rank times (m + n), over the sites; what was refused travelled too.
    assert round.bytes_up == round.bytes_down == 4 * (11 + 2 * 11 + 3 * 11 + 2 * 11)


def aggregated(round: Round, order) -> dict[str, torch.Tensor]:
    updates = {client: answer(round, client) for client in order}
    for client in order:
        round.accept(updates[client])
    found, _ = round.aggregate(lambda client, site: updates[client].adapter[site])
    return dict(found.tensors)


@pytest.mark.parametrize("mode", ["replace", "delta", "tail-in-base"])
def test_the_order_of_arrival_changes_no_bit(mode):
    chosen = settings(FlexLoRA(mode))
    expected = aggregated(begin(chosen), "abcd")
    for order in ("dcba", "cadb", "bdac"):
        got = aggregated(begin(chosen), order)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_the_update_is_the_weighted_mean_of_the_products_over_the_clients_of_a_site():
    round = begin()
    updates = {client: answer(round, client) for client in "abcd"}
    got = aggregated(round, "abcd")
    for site, weights in {
        "q": {"a": 1, "b": 2, "c": 3, "d": 4},
        "v": {"a": 1, "b": 2, "c": 3},
    }.items():
        total = sum(
            w * updates[client].adapter[site].to(dtype=torch.float64).dense()
            for client, w in weights.items()
        ) / sum(weights.values())
        u, s, vt = torch.linalg.svd(total)
        k = {"q": 3, "v": 2}[site]
        best = (u[:, :k] * s[:k]) @ vt[:k]
        held = (got[f"{site}/u"] * got[f"{site}/s"]) @ got[f"{site}/v"].T
        torch.testing.assert_close(held.double(), best, rtol=0, atol=1e-5)  # float32 factors


def test_factors_are_read_site_by_site_and_in_the_order_of_the_clients():
    round = begin()
    updates = {client: answer(round, client) for client in "dbca"}
    for update in updates.values():
        round.accept(update)
    read = []
    round.aggregate(lambda c, s: read.append((s, c)) or updates[c].adapter[s])
    assert read == [
        ("q", "a"),
        ("q", "b"),
        ("q", "c"),
        ("q", "d"),
        ("v", "a"),
        ("v", "b"),
        ("v", "c"),
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0, "b": 2.0}, "client 'a' has weight -1"),
        ({"a": 0.0, "b": 0.0}, "all zero"),
        ({"a": float("nan"), "b": 1.0}, "has weight nan"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message):
    good = begin()
    round = Round(settings(weights=weights), good.state, 2, 0, ["a", "b"])
    with pytest.raises(RuleError, match=message):
        aggregated(round, "ab")


def test_nothing_accepted_is_nothing_to_aggregate():
    round = begin()
    round.fail(Failure("a", 2, 0, "too hot"))
    with pytest.raises(RuleError, match="too hot"):
        round.aggregate(lambda *_: pytest.fail("nothing is read"))


def test_an_aggregate_beyond_all_numbers_is_an_error_not_a_state():
    chosen = settings()
    start = begin(chosen).state
    round = Round(chosen, start, 2, 0, ["a", "b"])
    huge = {c: answer(round, c) for c in "ab"}
    huge = {
        c: replace(u, adapter=u.adapter.to(dtype=torch.float64).scale(1e200))
        for c, u in huge.items()
    }
    for update in huge.values():
        round.accept(update)
    with pytest.raises(RuleError, match="too large for its numbers"):
        round.aggregate(lambda client, site: huge[client].adapter[site])


@pytest.mark.parametrize(
    ("accepted", "quorum", "enough"), [(0, 0.1, 0), (2, 0.5, 1), (1, 0.5, 0), (4, 1.0, 1)]
)
def test_a_quorum_is_a_share_of_those_asked(accepted, quorum, enough):
    round = begin()
    for client in "abcd"[:accepted]:
        round.accept(answer(round, client))
    assert round.enough(quorum) == bool(enough)


def test_clients_of_equal_ranks_share_one_assignment_which_is_made_once(monkeypatch):
    assigned = []
    real = FlexLoRA.assign_site
    monkeypatch.setattr(
        FlexLoRA, "assign_site", lambda self, *rest: assigned.append(rest[1:3]) or real(self, *rest)
    )
    round = begin()
    assigned.clear()
    tasks = {client: round.task(client) for client in "abc"}
    for client in "abc":
        round.assignment_hash(client), round.assignment(client)
    assert tasks["b"].assignment is tasks["c"].assignment
    assert sorted(assigned) == [("q", 1), ("q", 3), ("v", 2), ("v", 2)], "d was never asked for"


def test_seeds_differ_by_client_round_and_attempt_and_those_of_assignments_only_by_round():
    chosen = settings()
    begun = begin(chosen)
    rounds = [
        Round(chosen, begun.state, n, attempt, ["a", "b"]) for n in (2, 3) for attempt in (0, 1)
    ]
    seeds = [round.task(client).seed for round in rounds for client in "ab"]
    assert len(set(seeds)) == 8
    assert rounds[0].assignment_hash("b") == rounds[1].assignment_hash("b")


def test_fedit_takes_part_in_the_same_rounds():
    ranks = {client: {"q": 2} for client in "ab"}
    rule = FedIT()
    chosen = RoundSettings(rule, ranks, {"a": 1.0, "b": 3.0}, Scaling(), 0)
    begun = rule.init(FleetSpec({"q": (6, 5)}, ranks, {"q": 2}, 0))
    round = Round(chosen, begun, 1, 0, ["a", "b"])
    updates = {client: answer(round, client).adapter["q"] for client in "ab"}
    got = aggregated(round, "ba")
    mean = 0.25 * updates["a"].b.double() + 0.75 * updates["b"].b.double()
    torch.testing.assert_close(got["q/b"].double(), mean, rtol=0, atol=1e-6)


def test_sampling_is_seeded_sorted_and_without_replacement():
    clients = [f"c{i}" for i in range(50)]
    chosen = sample_clients(clients, 10, 7, 1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == sample_clients(clients[::-1], 10, 7, 1)
    assert chosen != sample_clients(clients, 10, 7, 2)
    assert sample_clients(clients, 99, 7) == sorted(clients)


def test_those_that_failed_are_asked_again_only_if_there_are_no_others():
    clients = [f"c{i}" for i in range(6)]
    assert not {"c1", "c2"} & set(sample_clients(clients, 4, 0, last=["c1", "c2"]))
    five = sample_clients(clients, 5, 0, last=["c1", "c2"])
    assert len(five) == 5
    assert {"c0", "c3", "c4", "c5"} < set(five)


def test_a_task_says_where_the_client_is_cut_in_this_round():
    at = {("a", 1): CutPoint(1), ("a", 2): CutPoint(1, 2)}
    held = {CutPoint(1): frozenset({"q"}), CutPoint(1, 2): frozenset()}
    chosen = settings(cut_of=lambda client, number: at.get((client, number)), sites_by_cut=held)
    round = begin(chosen)
    assert round.task("a").cut == CutPoint(1, 2)
    assert round.task("b").cut is None
    assert chosen.sites_at("a", 1) == {"q"}
    assert chosen.sites_at("b", 1) is None
    assert begin().task("a").cut is None
    assert round.cuts == {"1–2": 1, "whole": 3}
    assert begin().cuts == {"whole": 4}


def test_a_split_client_sends_and_gets_its_own_sites_and_what_crosses_its_cut():
    round = begin(divided(), ("a", "b", "d"))
    assigned = {client: round.assignment(client).start for client in "abd"}
    tensors = bytes_at(assigned["a"], "q") + bytes_at(assigned["b"], "v") + assigned["d"].nbytes
    assert round.bytes_down == tensors
    round.accept(answer(round, "a", metrics=WIRED))
    round.accept(answer(round, "b", metrics={**WIRED, "wire_up": 24.0}))
    round.accept(answer(round, "d", metrics=WIRED))  # Whole: nothing of it crossed a cut.
    assert (round.wire_up, round.wire_down) == (1024, 1400)
    assert round.bytes_down == tensors + 1400
    assert round.bytes_up == tensors + 1024
    assert round.accepted["a"].nbytes == bytes_at(assigned["a"], "q") + 1000
    assert sum(receipt.nbytes for receipt in round.accepted.values()) == round.bytes_up


def test_a_split_client_downloads_frozen_terms_and_merged_sums_of_its_own_sites():
    def assigned(rule, cut):
        chosen = replace(divided(rule), cut_of=lambda *_: cut)
        round = begin(chosen, ("a",))
        return round, round.assignment("a")

    round, assignment = assigned(FLoRA(), CutPoint(1))
    missed = round.settings.rule.catch_up(round.state, "a", {"q"})
    assert 0 < missed < round.settings.rule.catch_up(round.state, "a")
    assert round.bytes_down == bytes_at(assignment.start, "q") + missed
    for cut, held in ((CutPoint(1), "q"), (CutPoint(2), "v")):
        round, assignment = assigned(FlexLoRA("tail-in-base"), cut)
        assert {*assignment.frozen} == {"q"}
        frozen = assignment.frozen["q"].nbytes if held == "q" else 0
        assert round.bytes_down == bytes_at(assignment.start, held) + frozen


@pytest.mark.parametrize("name", ["wire_up", "wire_down"])
@pytest.mark.parametrize("value", [None, -1.0, float("nan"), float("inf")])
def test_a_split_client_must_say_what_crossed_its_cut(name, value):
    round = begin(divided())
    metrics = {key: number for key, number in WIRED.items() if key != name}
    metrics |= {} if value is None else {name: value}
    with pytest.raises(UpdateError, match=f"expected a number of bytes as {name!r}.*got {value}"):
        round.accept(answer(round, "a", metrics=metrics))
    other = {"wire_up": round.wire_down, "wire_down": round.wire_up}[name]
    assert other == {"wire_up": 700, "wire_down": 1000}[name]
    assert getattr(round, name) == 0


def test_what_crossed_a_cut_counts_once_also_when_nothing_came_of_it():
    round = begin(divided(), ("a", "b"))
    failed = Failure("b", round.number, round.attempt, "diverged", {"wire_up": 5, "wire_down": 3})
    round.fail(failed)
    assert (round.bytes_up, round.wire_up, round.wire_down) == (5, 5, 3)
    round.accept(answer(round, "a", metrics=WIRED))
    with pytest.raises(UpdateError, match="accepted already"):
        round.accept(answer(round, "a", metrics=WIRED))
    assert (round.wire_up, round.wire_down) == (1005, 703)
