"""One round without any I/O: who takes part, what they get, what is accepted, what comes of it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from polyrank.aggregation import Assignment, Contribution, Dealt, Rule, SiteReport, State, Update
from polyrank.aggregation import deal as deal_all
from polyrank.aggregation.weights import normalised
from polyrank.algebra import Adapter, Delta, Dense
from polyrank.errors import RuleError, UpdateError
from polyrank.federation.judge import WIRE, check_update, counted
from polyrank.planning.scaling import Scaling
from polyrank.planning.split import Split
from polyrank.seeds import derive

D = TypeVar("D", bound=Delta)

_Key = tuple[str | None, tuple[tuple[str, int], ...]]
"""Whose assignment: one client's own, or that of all clients with these ranks."""

ReadUpdate = Callable[[str, str], Delta]
"""(client, site) -> what that client returned at that site, accepted."""

Ranks = Mapping[str, int]
"""Rank per site."""


@dataclass(frozen=True)
class Task:
    """What one client is asked to do in a round.

    `seed` is the root of its random choices; `cut` says where its model is cut, if it is.
    """

    client: str
    round: int
    attempt: int
    seed: int
    assignment: Assignment
    cut: Split | None = None


@dataclass(frozen=True)
class Failure:
    """A client's answer that there will be no update, and why.

    `metrics` of a split client carry ``wire_up`` and ``wire_down`` like those of an update: bytes
    that travelled all the same.
    """

    client: str
    round: int
    attempt: int
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """What is kept in memory of an accepted update: all but its factors."""

    examples: int
    nbytes: int
    metrics: Mapping[str, float]
    importance: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundSettings:
    """What stays the same from round to round.

    `ranks` per client and site in the first round, and `ranks_in` those of any round, where they
    change; `weights` per client, not yet normalised; `scaling` of LoRA; `max_increment`: an update
    whose ‖ΔW − what was dealt‖_F over all sites is larger is refused. `cut_of` gives a client's cut
    in a round, and `held_by` the sites that the client holds at each cut that may come, of those
    that anyone trains; without them all clients run the whole model. `sites` are all of the
    model's, where a client may measure importance; None: those that it trains.
    """

    rule: Rule
    ranks: Mapping[str, Ranks]
    weights: Mapping[str, float]
    scaling: Scaling
    seed: int
    max_increment: float | None = None
    ranks_in: Callable[[int], Mapping[str, Ranks]] | None = None
    cut_of: Callable[[str, int], Split | None] | None = None
    held_by: Mapping[Split, frozenset[str]] = field(default_factory=dict)
    sites: frozenset[str] | None = None

    def cut(self, client: str, round: int) -> Split | None:
        """Return where this client's model is cut in this round; None if it runs all of it."""
        return None if self.cut_of is None else self.cut_of(client, round)

    def held(self, client: str, round: int) -> frozenset[str] | None:
        """Return the sites that a split client holds itself in this round; None: all of them."""
        cut = self.cut(client, round)
        return None if cut is None else self.held_by[cut]

    def affordable(self, client: str, round: int) -> Ranks:
        """Return the ranks that this client can afford in this round."""
        return (self.ranks if self.ranks_in is None else self.ranks_in(round))[client]


@dataclass
class Round:
    """A round in progress: deals assignments, judges updates, aggregates what it accepted.

    The caller (an engine) trains, keeps the accepted factors wherever it likes, and hands a reader
    of them to `aggregate`, which goes site by site and client by client in the order of their ids,
    so that neither memory nor the result depends on the order in which updates came. `rejected`
    says why, per client; `bytes_up` counts all that arrived, also what was not accepted.

    What travels to and from a split client are the factors of the sites that it holds itself, and
    its activations and gradients: these are in `wire_up` and `wire_down`, and in the bytes above.
    """

    settings: RoundSettings
    state: State
    number: int
    attempt: int
    clients: Sequence[str]
    accepted: dict[str, Receipt] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    wire_up: int = 0
    wire_down: int = 0
    _wired: set[str] = field(default_factory=set)
    _dealt: dict[_Key, tuple[Assignment, str]] = field(default_factory=dict)
    _by_client: dict[str, tuple[Assignment, str]] = field(default_factory=dict)

    def task(self, client: str) -> Task:
        """Return the client's task. Clients of equal ranks share one assignment object."""
        seed = derive(self.settings.seed, self.number, self.attempt, client, "train")
        cut = self.settings.cut(client, self.number)
        return Task(client, self.number, self.attempt, seed, self.assignment(client), cut)

    def assignment(self, client: str) -> Assignment:
        """Return what the rule deals this client; deterministic, so it can be asked again."""
        return self._deal(client)[0]

    def assignment_hash(self, client: str) -> str:
        """Return the hash that an update of this client must carry."""
        return self._deal(client)[1]

    @property
    def bytes_down(self) -> int:
        """Bytes that travel to all clients of the round, merged sums and gradients included."""
        return sum(map(self._down, self.clients)) + self.wire_down

    def _down(self, client: str) -> int:
        """Bytes of the tensors dealt to a client, at the sites that it holds."""
        assignment, held = self.assignment(client), self.settings.held(client, self.number)
        missed = self.settings.rule.catch_up(self.state, client, held)
        if held is None:
            return assignment.nbytes + missed
        own = replace(
            assignment, start=within(assignment.start, held), frozen=within(assignment.frozen, held)
        )
        return own.nbytes + missed

    @property
    def cuts(self) -> dict[str, int]:
        """How many of the clients are cut where; ``whole`` are those that are not."""
        cuts = (self.settings.cut(client, self.number) for client in self.clients)
        return dict(sorted(Counter("whole" if cut is None else str(cut) for cut in cuts).items()))

    def _deal(self, client: str) -> tuple[Assignment, str]:
        """Return the client's assignment and its hash, made once for all of equal ranks.

        A client that the rule keeps factors for has an assignment of its own.
        """
        if client not in self._by_client:
            rule, afforded = self.settings.rule, self.settings.affordable(client, self.number)
            ranks = rule.ranks(self.state, client, afforded)
            own = client if rule.personal(self.state, client) else None
            key = own, tuple(sorted(ranks.items()))
            if key not in self._dealt:
                scale = {site: self.settings.scaling.scale(rank) for site, rank in ranks.items()}
                seed = derive(self.settings.seed, self.number, "deal")
                assignment = deal_all(
                    rule, self.state, ranks, scale, seed, client=own, merged=self._merged
                )
                self._dealt[key] = assignment, assignment.hash()
            self._by_client[client] = self._dealt[key]
        return self._by_client[client]

    @cached_property
    def _merged(self) -> Adapter[Dense]:
        """What is merged into the base of all clients; one object, so that it is hashed once."""
        return self.settings.rule.merged(self.state)

    def accept(self, update: Update) -> None:
        """Take an update in, or record why not and raise UpdateError; never both."""
        nbytes = self._travelled(update) + self._wire(update)
        self.bytes_up += nbytes
        try:
            self._validate(update)
        except UpdateError as error:
            if update.client in self.clients and update.client not in self.accepted:
                self.rejected[update.client] = str(error)
            raise
        self.accepted[update.client] = Receipt(
            update.examples, nbytes, update.metrics, update.importance
        )
        self.rejected.pop(update.client, None)

    def _travelled(self, update: Update) -> int:
        if update.client not in self.clients:
            return update.adapter.nbytes
        held = self.settings.held(update.client, self.number)
        sent = update.adapter if held is None else within(update.adapter, held)
        return self.assignment(update.client).travelling(sent)

    def _wire(self, answer: Update | Failure) -> int:
        """Count a split client's activations and gradients, once; return the bytes up."""
        client = answer.client
        if client in self._wired or client not in self.clients:
            return 0
        if self.settings.cut(client, self.number) is None:
            return 0
        self._wired.add(client)
        up, down = (counted(answer.metrics, name) or 0 for name in WIRE)
        self.wire_up += up
        self.wire_down += down
        return up

    def fail(self, failure: Failure) -> None:
        """Record that a client has no update to give; UpdateError if it was not asked for one."""
        self._expected(failure)
        self.bytes_up += self._wire(failure)
        self.rejected[failure.client] = failure.reason

    def enough(self, quorum: float) -> bool:
        """Whether at least this share of the clients has an accepted update."""
        return len(self.accepted) >= quorum * len(self.clients) - 1e-9

    def _expected(self, answer: Update | Failure) -> str:
        """Return the place for messages, or raise UpdateError if this round awaits no answer."""
        place = f"update of client {answer.client!r} in round {self.number}"
        if answer.client not in self.clients:
            raise UpdateError(f"{place}: the client was not asked to take part in this round")
        if (answer.round, answer.attempt) != (self.number, self.attempt):
            raise UpdateError(
                f"{place}: expected round {self.number}, attempt {self.attempt}; it answers round "
                f"{answer.round}, attempt {answer.attempt}; it is not aggregated"
            )
        if answer.client in self.accepted:
            raise UpdateError(f"{place}: an update of this client was accepted already")
        return place

    def _validate(self, update: Update) -> None:
        place = self._expected(update)
        assignment, expected = self._deal(update.client)
        split = self.settings.cut(update.client, self.number) is not None
        bound, sites = self.settings.max_increment, self.settings.sites
        check_update(update, assignment, expected, place, split, bound, sites)

    def aggregate(self, read: ReadUpdate) -> tuple[State, dict[str, SiteReport]]:
        """Return the next state and a report per site; RuleError if no update was accepted."""
        if not self.accepted:
            raise RuleError(f"round {self.number}: no update was accepted: {self.rejected}")
        rule, accepted = self.settings.rule, sorted(self.accepted)
        given = {client: self.settings.weights[client] for client in accepted}
        weights = rule.weigh(self.state, given, lambda client: self._norm(client, read))
        state, reports = self.state, {}
        for site in sorted({site for c in accepted for site in self.assignment(c).start}):
            clients = [c for c in accepted if site in self.assignment(c).start]
            shares = normalised({c: weights[c] for c in clients})
            contributions = self._contributions(site, clients, shares, read)
            state, report = rule.merge_site(state, site, contributions)
            if not math.isfinite(report.energy):
                raise RuleError(
                    f"round {self.number}: the aggregate at {site} is too large for its "
                    "numbers; lower the learning rate, clip, or set faults.max_increment"
                )
            reports[site] = report
        return rule.conclude(state, accepted), reports

    def _norm(self, client: str, read: ReadUpdate) -> float:
        """‖ΔW‖_F of a client's update over all its sites."""
        sites = self.assignment(client).start
        return math.sqrt(sum(read(client, site).norm() ** 2 for site in sites))

    def _contributions(
        self, site: str, clients: Sequence[str], weights: Sequence[float], read: ReadUpdate
    ) -> Iterator[Contribution]:
        for client, weight in zip(clients, weights, strict=True):
            assignment = self.assignment(client)
            penalty = assignment.penalty
            dealt = Dealt(
                assignment.start[site],
                assignment.frozen.get(site),
                assignment.train,
                None if penalty is None else (penalty.strength, penalty.keep[site]),
            )
            yield Contribution(weight, dealt, read(client, site), client)


def within(adapter: Adapter[D], sites: Collection[str]) -> Adapter[D]:
    """Return what an adapter has at some sites; it need not have all of them."""
    return adapter.restrict(site for site in adapter if site in sites)


def sample_clients(
    clients: Sequence[str], count: int, *seed: int | str, last: Collection[str] = ()
) -> list[str]:
    """Return `count` of the clients without replacement, sorted, from a seed of these parts.

    Clients named in `last` are taken only where the others do not suffice.
    """
    draw = random.Random(derive(*seed))
    first = sorted(set(clients) - set(last))
    chosen = draw.sample(first, min(count, len(first)))
    rest = sorted(set(clients) & set(last))
    return sorted(chosen + draw.sample(rest, min(count - len(chosen), len(rest))))
