"""What a round asks of its rule, and that an answer is of the kind that was asked for."""

from dataclasses import dataclass, replace

import pytest
import torch

from polyrank.aggregation import FleetSpec, Rule, SiteAssignment, SiteReport, State, Update
from polyrank.algebra import Adapter, Dense, LowRank, Sparse
from polyrank.errors import UpdateError
from polyrank.planning import Scaling
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round

SHAPE = (6, 5)
NUMBERS = {"loss": 1.0, "tokens": 20.0, "target_tokens": 10.0}
POSITIONS = torch.tensor([3, 17, 8])


def factors(rank):
    draw = torch.Generator().manual_seed(0)
    return LowRank(torch.randn(6, rank, generator=draw), torch.randn(rank, 5, generator=draw))


@dataclass(frozen=True)
class Toy(Rule):
    """Assigns factors, B alone, or a sparse update; weighs by norm, prunes b, and takes notes."""

    kind: str = "both"

    @property
    def name(self):
        return "toy"

    def init(self, spec):
        return State({"q/sum": torch.zeros(SHAPE)}, {"rounds": 0})

    def assign_site(self, state, site, rank, scale, seed):
        if self.kind == "sparse":
            return SiteAssignment(Sparse(torch.zeros(3), POSITIONS, SHAPE))
        return SiteAssignment(factors(rank), None, self.kind, (0.5, 1))

    def merged(self, state):
        return Adapter({} if self.kind == "sparse" else {"q": Dense(torch.ones(SHAPE))})

    def merge_site(self, state, site, contributions):
        total = sum(one.weight * one.result.dense() for one in contributions)
        return state.update({"q/sum": total}), SiteReport(float(total.norm() ** 2), 0.0)

    def adapter(self, state):
        return Adapter({"q": Dense(state.tensors["q/sum"])})

    def ranks(self, state, client, ranks):
        return {"q": 1} if client == "b" else ranks

    def weigh(self, state, weights, norm):
        return {client: weight * norm(client) for client, weight in weights.items()}

    def conclude(self, state, clients):
        return state.update({}, {"rounds": state.scalars["rounds"] + 1, "last": list(clients)})

    def catch_up(self, state, client, sites=None):
        return {"a": 100, "b": 7}[client]


def begun(kind="both"):
    ranks = {"a": {"q": 3}, "b": {"q": 3}}
    settings = RoundSettings(Toy(kind), ranks, {"a": 1.0, "b": 3.0}, Scaling(), seed=0)
    spec = FleetSpec({"q": SHAPE}, ranks, {"q": 3}, 0)
    return Round(settings, settings.rule.init(spec), 1, 0, ["a", "b"])


def answer(round, client, delta):
    assignment = round.assignment_hash(client)
    return Update(client, 1, 0, assignment, 9, Adapter({"q": delta}), NUMBERS)


def test_a_rule_prunes_weighs_and_concludes():
    round = begun()
    assert round.assignment("a").ranks == {"q": 3}
    assert round.assignment("b").ranks == {"q": 1}
    results = {"a": factors(3).scale(2.0), "b": factors(1)}
    for client, delta in results.items():
        round.accept(answer(round, client, delta))
    state, _ = round.aggregate(lambda client, site: results[client])
    by_norm = {"a": results["a"].norm(), "b": 3 * results["b"].norm()}
    total = sum(by_norm.values())
    expected = sum(by_norm[c] / total * results[c].dense() for c in results)
    assert torch.allclose(state.tensors["q/sum"], expected, atol=1e-5)
    assert state.scalars == {"rounds": 1, "last": ["a", "b"]}


def test_an_assignment_carries_all_that_the_rule_made_and_its_hash_covers_it():
    assignment = begun("b").assignment("a")
    assert (assignment.train, assignment.penalty.strength) == ("b", 0.5)
    assert assignment.penalty.keep == {"q": 1}
    assert torch.equal(assignment.merged["q"].matrix, torch.ones(SHAPE))
    others = [
        replace(assignment, train="both"),
        replace(assignment, penalty=None),
        replace(assignment, penalty=replace(assignment.penalty, strength=0.6)),
        replace(assignment, penalty=replace(assignment.penalty, keep={"q": 2})),
        replace(assignment, merged=Adapter({})),
        replace(assignment, merged=Adapter({"q": Dense(torch.zeros(SHAPE))})),
    ]
    assert len({one.hash() for one in [assignment, *others]}) == 7


def test_bytes_are_those_of_what_travels():
    whole, b_only, sparse = begun("both"), begun("b"), begun("sparse")
    a, b = 4 * 5, 4 * 6  # bytes of one row of A, of one column of B
    assert whole.bytes_down == 107 + (3 + 1) * (a + b)
    assert b_only.bytes_down == 107 + (3 + 1) * b
    assert sparse.bytes_down == 107 + 2 * 3 * 4
    b_only.accept(answer(b_only, "a", factors(3)))
    sparse.accept(answer(sparse, "a", Sparse(torch.ones(3), POSITIONS, SHAPE)))
    assert (b_only.bytes_up, sparse.bytes_up) == (3 * b, 12)
    assert b_only.accepted["a"].nbytes == 3 * b


@pytest.mark.parametrize(
    ("kind", "delta", "message"),
    [
        ("b", LowRank(torch.ones(6, 3), torch.ones(3, 5)), "expected a as it was sent"),
        ("both", Dense(torch.ones(SHAPE)), "expected .* rank 3|expected LowRank, got Dense"),
        (
            "sparse",
            Sparse(torch.ones(3), POSITIONS.flip(0), SHAPE),
            "expected positions as it was sent",
        ),
        ("sparse", factors(3), "expected Sparse, got LowRank"),
        ("sparse", Sparse(torch.tensor([1.0, float("nan"), 1.0]), POSITIONS, SHAPE), "NaN"),
        ("sparse", Sparse(torch.ones(3, dtype=torch.int64), POSITIONS, SHAPE), "real numbers"),
    ],
)
def test_an_answer_of_another_kind_is_refused_and_not_aggregated(kind, delta, message):
    round = begun(kind)
    with pytest.raises(UpdateError, match=message):
        round.accept(answer(round, "a", delta))
    assert not round.accepted
    assert "a" in round.rejected


def test_b_alone_may_change_and_a_may_come_back_widened():
    round = begun("b")
    start = round.assignment("a").start["q"]
    sent = LowRank(start.b.double() + 1, start.a.double())
    round.accept(answer(round, "a", sent))
    assert list(round.accepted) == ["a"]


def test_an_increment_of_sparse_values_is_bounded_too():
    settings = replace(begun("sparse").settings, max_increment=1.0)
    round = replace(begun("sparse"), settings=settings)
    with pytest.raises(UpdateError, match=r"norm 1\.732, more than max_increment"):
        round.accept(answer(round, "a", Sparse(torch.ones(3), POSITIONS, SHAPE)))
