"""One round without any I/O: assignments to clients, their updates, and the next state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from polyrank.aggregation import Assignment, Contribution, SiteAssignment, SiteReport, State, Update
from polyrank.aggregation.weights import capped, normalised
from polyrank.algebra import Delta
from polyrank.errors import RuleError, UpdateError
from polyrank.rounds.assignments import RoundAssignments, RoundSettings, within
from polyrank.rounds.clipping import clipped, shortened
from polyrank.rounds.messages import (
    AcceptedUpdate,
    Failure,
    RejectedUpdate,
    RejectionKind,
    TrainTask,
)
from polyrank.rounds.validation import WIRE, check_update, counted
from polyrank.seeds import derive

ReadUpdate = Callable[[str, str], Delta]
"""(client, site) -> the accepted update of that client at that site."""


@dataclass
class Round:
    """A round in progress.

    The caller has the `task`s trained, hands every answer to `accept`, `fail` or `reject_stale`,
    stores the accepted factors wherever it likes, and hands a reader of them to `aggregate`, which
    goes site by site and client by client in the order of their names. So neither memory nor the
    result depends on the order in which updates came.

    `rejections` has every answer that is not aggregated, in the order of arrival; `rejected` says
    why, per client of the round without an accepted update, by its last answer to this round.
    `traffic` and its sums, `bytes_up` and `bytes_down`, count all that travelled, also what was not
    accepted. To and from a split client travel the factors at the sites in its own blocks, and its
    activations and gradients; the latter are in `wire_up` and `wire_down` too.

    An update that is to be shortened is stored as it came, so that a resumed run validates the same
    again; its factors are shortened where they are read.
    """

    settings: RoundSettings
    state: State
    number: int
    attempt: int
    clients: Sequence[str]
    accepted: dict[str, AcceptedUpdate] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    rejections: list[RejectedUpdate] = field(default_factory=list)
    _up: Counter[str] = field(default_factory=Counter)
    _wire_up: Counter[str] = field(default_factory=Counter)
    _wire_down: Counter[str] = field(default_factory=Counter)
    _assignments: RoundAssignments = field(init=False)

    def __post_init__(self) -> None:
        self._assignments = RoundAssignments(self.settings, self.state, self.number)

    # --- to the clients ---

    def task(self, client: str) -> TrainTask:
        """Return the client's task. Clients of equal ranks share one assignment object."""
        seed = derive(self.settings.seed, self.number, self.attempt, client, "train")
        cut = self.settings.cut(client, self.number)
        return TrainTask(client, self.number, self.attempt, seed, self.assignment(client), cut)

    def assignment(self, client: str) -> Assignment:
        """Return the client's assignment; deterministic, so it can be asked for again."""
        return self._assignments.of(client)[0]

    def assignment_hash(self, client: str) -> str:
        """Return the hash that an update of this client must carry."""
        return self._assignments.of(client)[1]

    @property
    def cuts(self) -> dict[str, int]:
        """How many of the clients are cut where; ``whole`` are those that are not."""
        cuts = (self.settings.cut(client, self.number) for client in self.clients)
        return dict(sorted(Counter("whole" if cut is None else str(cut) for cut in cuts).items()))

    # --- bytes ---

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes per client, ``up`` and ``down``: of those asked, and of others that answered."""
        asked = set(self.clients)
        return {
            client: {
                "up": self._up[client],
                "down": self._wire_down[client]
                + (self._assignments.nbytes(client) if client in asked else 0),
            }
            for client in dict.fromkeys([*self.clients, *self._up])
        }

    @property
    def bytes_up(self) -> int:
        """Bytes that arrived in this round, from whomever."""
        return self._up.total()

    @property
    def bytes_down(self) -> int:
        """Bytes that travel to all clients of the round, merged sums and gradients included."""
        return sum(map(self._assignments.nbytes, self.clients)) + self.wire_down

    @property
    def wire_up(self) -> int:
        """Bytes of activations that split clients sent."""
        return self._wire_up.total()

    @property
    def wire_down(self) -> int:
        """Bytes of gradients that split clients got."""
        return self._wire_down.total()

    def _count_wire(self, answer: Update | Failure) -> int:
        """Count a split client's activations and gradients, once; return the bytes up."""
        client = answer.client
        if self.settings.cut(client, self.number) is None or client in self._wire_up:
            return 0
        up, down = (counted(answer.metrics, name) or 0 for name in WIRE)
        self._wire_up[client], self._wire_down[client] = up, down
        self._up[client] += up
        return up

    def _travelled(self, update: Update) -> int:
        """Return the bytes of an update's factors that a client sent."""
        if update.client not in self.clients:
            return update.adapter.nbytes
        sites = self.settings.sites_at(update.client, self.number)
        sent = update.adapter if sites is None else within(update.adapter, sites)
        return self.assignment(update.client).travelling(sent)

    # --- from the clients ---

    def accept(self, update: Update) -> Update:
        """Take an update in and return it as it is to be stored, or raise UpdateError.

        A rejected one is recorded with its reason. The returned update is the one that came, also
        where only a share of its increment counts.
        """
        client, nbytes = update.client, self._travelled(update)
        self._up[client] += nbytes
        self._expect(update)
        wire = self._count_wire(update)
        try:
            share = self._validated(update)
        except UpdateError as error:
            self.rejected[client] = str(error)
            self._reject(client, "invalid", str(error))
            raise
        self.accepted[client] = AcceptedUpdate(
            update.examples, nbytes + wire, update.metrics, update.importance, share
        )
        self.rejected.pop(client, None)
        return update

    def fail(self, failure: Failure) -> None:
        """Record that a client has no update to give; UpdateError if none is awaited from it."""
        self._expect(failure)
        self._count_wire(failure)
        self.rejected[failure.client] = failure.reason
        self._reject(failure.client, failure.kind, failure.reason)

    def reject_stale(self, answer: Update | Failure) -> None:
        """Record an answer to another round or attempt, and its bytes, and do no more.

        Whether the client has an update in this round is open as before.
        """
        if isinstance(answer, Update):
            self._up[answer.client] += self._travelled(answer)
        kind, reason = self._unexpected(answer) or ("stale", "it answers another round")
        self._reject(answer.client, kind, reason)

    def enough(self, quorum: float) -> bool:
        """Whether at least this share of the clients has an accepted update."""
        return len(self.accepted) >= quorum * len(self.clients) - 1e-9

    def _reject(self, client: str, kind: RejectionKind, reason: str) -> None:
        self.rejections.append(RejectedUpdate.of(client, kind, reason))

    def _expect(self, answer: Update | Failure) -> None:
        """Reject an answer that this round does not await, and raise UpdateError."""
        unexpected = self._unexpected(answer)
        if unexpected is not None:
            self._reject(answer.client, *unexpected)
            raise UpdateError(unexpected[1])

    def _unexpected(self, answer: Update | Failure) -> tuple[RejectionKind, str] | None:
        place = self._place(answer.client)
        if (answer.round, answer.attempt) != (self.number, self.attempt):
            return "stale", (
                f"{place}: expected round {self.number}, attempt {self.attempt}; it answers round "
                f"{answer.round}, attempt {answer.attempt}; it is not aggregated"
            )
        if answer.client not in self.clients:
            return "invalid", f"{place}: the client was not asked to take part in this round"
        if answer.client in self.accepted:
            return "duplicate", f"{place}: an update of this client was accepted already"
        return None

    def _place(self, client: str) -> str:
        return f"update of client {client!r} in round {self.number}"

    def _validated(self, update: Update) -> float:
        """Return the share of its increment that counts; UpdateError for an invalid update."""
        chosen, place = self.settings, self._place(update.client)
        assignment, expected = self._assignments.of(update.client)
        split = chosen.cut(update.client, self.number) is not None
        check_update(update, assignment, expected, place, split, chosen.max_increment, chosen.sites)
        if chosen.clip_increment is None:
            return 1.0
        try:
            return clipped(update, assignment, chosen.clip_increment)[1]
        except UpdateError as error:
            raise UpdateError(f"{place}: {error}") from error

    # --- the next state ---

    def _shortening(self, read: ReadUpdate) -> ReadUpdate:
        """Return a reader that shortens the updates of which only a share counts."""

        def read_shortened(client: str, site: str) -> Delta:
            came, share = read(client, site), self.accepted[client].clipped
            if share == 1:
                return came
            return shortened(self.assignment(client).start[site], came, share)

        return read_shortened

    def aggregate(self, read: ReadUpdate) -> tuple[State, dict[str, SiteReport]]:
        """Return the next state and a report per site; RuleError if no update was accepted.

        `max_share` holds for the weights that a rule is given, and again, after a rule weighed in
        its own way, at each site among the clients that train it.
        """
        if not self.accepted:
            raise RuleError(f"round {self.number}: no update was accepted: {self.rejected}")
        rule, accepted = self.settings.rule, sorted(self.accepted)
        read, most = self._shortening(read), self.settings.max_share
        given = capped({client: self.settings.weights[client] for client in accepted}, most)
        weights = rule.weigh(self.state, given, lambda client: self._norm(client, read))
        state, reports = self.state, {}
        for site in sorted({site for c in accepted for site in self.assignment(c).start}):
            clients = [c for c in accepted if site in self.assignment(c).start]
            shares = normalised(capped({c: weights[c] for c in clients}, most))
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
            sent = SiteAssignment(
                assignment.start[site],
                assignment.frozen.get(site),
                assignment.train,
                None if penalty is None else (penalty.strength, penalty.keep[site]),
            )
            yield Contribution(weight, sent, read(client, site), client)


def added(parts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return {client: {"up", "down"}} summed over several such tables, in order of the names."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for client, counts in part.items():
            total.setdefault(client, Counter()).update(counts)
    return {
        client: {"up": total[client]["up"], "down": total[client]["down"]}
        for client in sorted(total)
    }
