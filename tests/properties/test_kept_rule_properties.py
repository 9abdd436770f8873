"""FLoRA with kept factors, in rounds as they are played: mixed and changing ranks, any attendance.

Everything is float64 from the first update on, beside a dense sum, so tolerances are 1e-9.
"""

import json
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyrank.aggregation import FleetSpec, FLoRA, State, Update
from polyrank.algebra import Adapter, LowRank
from polyrank.planning import Scaling
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round

SHAPES = {"q": (9, 7), "up": (8, 6)}
CLIENTS = ("a", "a/b ü", "c", "d")
NUMBERS = {"loss": 1.0, "tokens": 20.0, "target_tokens": 10.0}
KEEP = FLoRA(reinitialise=False)

relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])


@dataclass(frozen=True)
class Plan:
    """Who is asked in which round, at which ranks; a client may lack one of the sites."""

    attending: list[list[str]]
    ranks: list[dict[str, dict[str, int]]]
    weights: dict[str, float]
    scaling: Scaling


@st.composite
def plans(draw, rounds=4):
    rank = st.integers(1, 6)
    both, one = st.fixed_dictionaries(dict.fromkeys(SHAPES, rank)), st.builds(dict, q=rank)
    ranks = st.fixed_dictionaries(dict.fromkeys(CLIENTS, both | one))
    attending = st.lists(st.sampled_from(CLIENTS), min_size=1, unique=True)
    return Plan(
        draw(st.lists(attending, min_size=rounds, max_size=rounds)),
        draw(st.lists(ranks, min_size=rounds, max_size=rounds)),
        draw(st.fixed_dictionaries(dict.fromkeys(CLIENTS, st.floats(0.1, 9.0)))),
        Scaling(draw(st.sampled_from(["fixed", "rslora", "proportional"]))),
    )


def rounds(rule, plan, change):
    """Play the plan; yield every round with what was returned, and the state after it."""
    every = {f"{c} in {t}": own for t, by in enumerate(plan.ranks) for c, own in by.items()}
    state = rule.init(FleetSpec(SHAPES, every, dict.fromkeys(SHAPES, 6), seed=0))
    how = RoundSettings(
        rule, plan.ranks[0], plan.weights, plan.scaling, seed=0, ranks_in=plan.ranks.__getitem__
    )
    for t, clients in enumerate(plan.attending):
        round = Round(how, state, t, 0, sorted(clients))
        results = {}
        for client in clients:
            start = round.assignment(client).start
            results[client] = Adapter({s: change(d, t, client, s) for s, d in start.items()})
            sent = (round.assignment_hash(client), 9, results[client], NUMBERS)
            round.accept(Update(client, t, 0, *sent))
        state, _ = round.aggregate(lambda client, site, of=results: of[client][site])
        state = State(state.tensors, json.loads(json.dumps(state.scalars)))  # as after a resume
        yield round, results, state


def noisy(start, t, client, site):
    draw = torch.Generator().manual_seed(1000 * t + 10 * CLIENTS.index(client) + len(site))
    b, a = (
        x.double() + torch.randn(x.shape, generator=draw, dtype=torch.float64)
        for x in (start.b, start.a)
    )
    return LowRank(b, a)


def unchanged(start, *_):
    return LowRank(start.b.double(), start.a.double())


def dense(delta):
    return delta.to(dtype=torch.float64).dense()


def close(one, other):
    return float((one - other).norm()) <= 1e-9 * (1 + float(other.norm()))


@given(plans())
@relaxed
def test_every_client_begins_at_the_sum_of_all_increments(plan):
    expected = {site: torch.zeros(shape, dtype=torch.float64) for site, shape in SHAPES.items()}
    for round, results, state in rounds(KEEP, plan, noisy):
        for client in CLIENTS:  # whether it is asked or not
            got = round.assignment(client)
            begins = got.start + got.frozen + got.merged
            for site in SHAPES:
                there = dense(begins[site]) if site in begins else torch.zeros(SHAPES[site])
                assert close(there, expected[site])
        for site in SHAPES:
            there = [c for c in results if site in results[c]]
            total = sum(plan.weights[c] for c in there)
            for c in there:
                start = round.assignment(c).start[site]
                change = dense(results[c][site]) - dense(start)
                expected[site] = expected[site] + plan.weights[c] / total * change
            assert close(dense(KEEP.adapter(state)[site]), expected[site])


@given(plans())
@relaxed
def test_a_client_goes_on_with_what_it_returned_last_as_far_as_its_rank_goes(plan):
    last = {}
    for round, results, _ in rounds(KEEP, plan, noisy):
        for client in CLIENTS:
            for site, start in round.assignment(client).start.items():
                own = last.get((client, site))
                if own is None:
                    assert not start.b.any()
                    continue
                shared = min(start.rank, own.rank)
                assert torch.equal(start.b[:, :shared], own.b[:, :shared])
                assert torch.equal(start.a[:shared], own.a[:shared])
                assert not start.b[:, shared:].any()
                assert start.a[shared:].any(dim=1).all()
        last |= {(c, site): d for c, found in results.items() for site, d in found.items()}


@given(plans(rounds=2), st.integers(1, 3))
@relaxed
def test_rounds_without_training_leave_the_sum_bit_by_bit(plan, idle):
    again = Plan(
        plan.attending + plan.attending[:idle],
        plan.ranks + plan.ranks[:idle],
        plan.weights,
        plan.scaling,
    )

    def trained_first(start, t, *rest):
        return noisy(start, t, *rest) if t < 2 else unchanged(start)

    sums = [KEEP.adapter(state) for *_, state in rounds(KEEP, again, trained_first)]
    for site in SHAPES:
        assert all(torch.equal(one[site].matrix, sums[1][site].matrix) for one in sums[1:])


@given(plans(rounds=1))
@relaxed
def test_the_first_round_is_that_of_flora_to_the_last_bit(plan):
    plays = [next(rounds(rule, plan, noisy)) for rule in (KEEP, FLoRA())]
    (one, _, after), (two, _, expected) = plays
    for client in CLIENTS:
        assert one.assignment_hash(client) == two.assignment_hash(client)
    for name, tensor in expected.tensors.items():
        assert torch.equal(after.tensors[name], tensor)
    assert after.scalars == expected.scalars
    assert one.bytes_down == two.bytes_down
