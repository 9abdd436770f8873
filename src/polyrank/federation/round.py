"""One round without any I/O: who takes part, what they get, what is accepted, what comes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from polyrank.aggregation import Assignment, Contribution, Dealt, Rule, SiteReport, State, Update
from polyrank.aggregation import deal as deal_all
from polyrank.aggregation.weights import normalised
from polyrank.algebra import LowRank
from polyrank.errors import RuleError, UpdateError
from polyrank.planning.scaling import Scaling
from polyrank.seeds import derive

METRICS = ("loss", "tokens", "target_tokens")
"""The numbers that every update must carry, for the round's record."""

ReadFactors = Callable[[str, str], LowRank]
"""(client, site) -> the accepted factors of that client at that site."""


@dataclass(frozen=True)
class Task:
    """What one client is asked to do in a round. `seed` is the root of its random choices."""

    client: str
    round: int
    attempt: int
    seed: int
    assignment: Assignment


@dataclass(frozen=True)
class Failure:
    """A client's answer that there will be no update, and why."""

    client: str
    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """What is kept in memory of an accepted update: all but its factors."""

    examples: int
    nbytes: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RoundSettings:
    """What stays the same from round to round.

    `ranks` per client and site; `weights` per client, not yet normalised; `scaling` of LoRA;
    `max_increment`: an update whose ‖ΔW − what was dealt‖_F over all sites is larger is refused.
    """

    rule: Rule
    ranks: Mapping[str, Mapping[str, int]]
    weights: Mapping[str, float]
    scaling: Scaling
    seed: int
    max_increment: float | None = None


@dataclass
class Round:
    """A round in progress: deals assignments, judges updates, aggregates what it accepted.

    The caller (an engine) trains, keeps the accepted factors wherever it likes, and hands a reader
    of them to `aggregate`, which goes site by site and client by client in the order of their ids,
    so that neither memory nor the result depends on the order in which updates came. `rejected`
    says why, per client; `bytes_up` counts all that arrived, also what was not accepted.
    """

    settings: RoundSettings
    state: State
    number: int
    attempt: int
    clients: Sequence[str]
    accepted: dict[str, Receipt] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    _dealt: dict[tuple[tuple[str, int], ...], tuple[Assignment, str]] = field(default_factory=dict)
    _by_client: dict[str, tuple[Assignment, str]] = field(default_factory=dict)

    def task(self, client: str) -> Task:
        """Return the client's task. Clients of equal ranks share one assignment object."""
        seed = derive(self.settings.seed, self.number, self.attempt, client, "train")
        return Task(client, self.number, self.attempt, seed, self.assignment(client))

    def assignment(self, client: str) -> Assignment:
        """Return what the rule deals this client; deterministic, so it can be asked again."""
        return self._deal(client)[0]

    def assignment_hash(self, client: str) -> str:
        """Return the hash that an update of this client must carry."""
        return self._deal(client)[1]

    @property
    def bytes_down(self) -> int:
        """Bytes of the tensors that travel to all clients of the round."""
        return sum(self.assignment(client).nbytes for client in self.clients)

    def _deal(self, client: str) -> tuple[Assignment, str]:
        """Return the client's assignment and its hash, made once per distinct set of ranks."""
        if client not in self._by_client:
            ranks = self.settings.ranks[client]
            key = tuple(sorted(ranks.items()))
            if key not in self._dealt:
                scale = {site: self.settings.scaling.scale(rank) for site, rank in key}
                seed = derive(self.settings.seed, self.number, "deal")
                assignment = deal_all(self.settings.rule, self.state, ranks, scale, seed)
                self._dealt[key] = assignment, assignment.hash()
            self._by_client[client] = self._dealt[key]
        return self._by_client[client]

    def accept(self, update: Update) -> None:
        """Take an update in, or record why not and raise UpdateError; never both."""
        self.bytes_up += update.nbytes
        try:
            self._validate(update)
        except UpdateError as error:
            if update.client in self.clients and update.client not in self.accepted:
                self.rejected[update.client] = str(error)
            raise
        self.accepted[update.client] = Receipt(update.examples, update.nbytes, update.metrics)
        self.rejected.pop(update.client, None)

    def fail(self, failure: Failure) -> None:
        """Record that a client has no update to give; UpdateError if it was not asked for one."""
        self._expected(failure)
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
        if update.assignment != expected:
            raise UpdateError(
                f"{place}: it was trained from other factors than were dealt (hash "
                f"{update.assignment[:12]}…, expected {expected[:12]}…)"
            )
        if update.examples < 1:
            raise UpdateError(
                f"{place}: expected at least 1 training example, got {update.examples}"
            )
        for name in METRICS:
            value = update.metrics.get(name)
            if value is None or not math.isfinite(value):
                raise UpdateError(f"{place}: expected a finite number as {name!r}, got {value}")
        if update.metrics["target_tokens"] < 1:
            raise UpdateError(f"{place}: expected at least 1 target token")
        missing = sorted(assignment.start.keys() - update.adapter.keys())
        extra = sorted(update.adapter.keys() - assignment.start.keys())
        if missing or extra:
            raise UpdateError(f"{place}: sites missing {missing}, sites not asked for {extra}")
        for site, start in assignment.start.items():
            result = update.adapter[site]
            if result.shape != start.shape or result.rank != start.rank:
                raise UpdateError(
                    f"{place}: at {site} expected {start.shape} of rank {start.rank}, got "
                    f"{result.shape} of rank {result.rank}"
                )
            if not result.b.dtype.is_floating_point:
                raise UpdateError(f"{place}: at {site} expected real numbers, got {result.b.dtype}")
            if not result.is_finite():
                raise UpdateError(
                    f"{place}: NaN or infinite entries at {site}; lower the learning rate or clip"
                )
        self._check_increment(update, assignment, place)

    def _check_increment(self, update: Update, assignment: Assignment, place: str) -> None:
        bound = self.settings.max_increment
        if bound is None:
            return
        squared = sum(
            (update.adapter[s].to(dtype=torch.float64) - start.to(dtype=torch.float64)).norm() ** 2
            for s, start in assignment.start.items()
        )
        if not squared**0.5 <= bound:
            raise UpdateError(
                f"{place}: its increment has norm {squared**0.5:.4g}, more than max_increment = "
                f"{bound}"
            )

    def aggregate(self, read: ReadFactors) -> tuple[State, dict[str, SiteReport]]:
        """Return the next state and a report per site; RuleError if no update was accepted."""
        if not self.accepted:
            raise RuleError(f"round {self.number}: no update was accepted: {self.rejected}")
        state, reports = self.state, {}
        for site in self.sites():
            clients = [c for c in sorted(self.accepted) if site in self.settings.ranks[c]]
            if clients:
                weights = normalised({c: self.settings.weights[c] for c in clients})
                contributions = self._contributions(site, clients, weights, read)
                state, report = self.settings.rule.merge_site(state, site, contributions)
                if not math.isfinite(report.energy):
                    raise RuleError(
                        f"round {self.number}: the aggregate at {site} is too large for its "
                        "numbers; lower the learning rate, clip, or set faults.max_increment"
                    )
                reports[site] = report
        return state, reports

    def sites(self) -> list[str]:
        """Every site that some client of the fleet trains, in order of name."""
        # Clients of one type share one dict of ranks: look at each dict once.
        distinct = {id(ranks): ranks for ranks in self.settings.ranks.values()}
        return sorted({site for ranks in distinct.values() for site in ranks})

    def _contributions(
        self, site: str, clients: Sequence[str], weights: Sequence[float], read: ReadFactors
    ) -> Iterator[Contribution]:
        for client, weight in zip(clients, weights, strict=True):
            assignment = self.assignment(client)
            dealt = Dealt(assignment.start[site], assignment.frozen.get(site))
            yield Contribution(weight, dealt, read(client, site))


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
