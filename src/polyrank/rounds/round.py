"""One round without any I/O: who takes part, what they get, what is accepted, what comes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from polyrank.aggregation import Assignment, Contribution, Dealt, SiteReport, State, Update
from polyrank.aggregation.weights import capped, normalised
from polyrank.algebra import Delta
from polyrank.errors import RuleError, UpdateError
from polyrank.rounds.assignments import RoundAssignments, RoundSettings, within
from polyrank.rounds.clipping import clipped, shortened
from polyrank.rounds.messages import AcceptedUpdate, Failure, Kind, RejectedUpdate, TrainTask
from polyrank.rounds.validation import WIRE, check_update, counted
from polyrank.seeds import derive

ReadUpdate = Callable[[str, str], Delta]
"""(client, site) -> what that client returned at that site, accepted."""


@dataclass
class Traffic:
    """Bytes up per client, and those within them, and down, that crossed split clients' cuts.

    What is dealt to a client is not counted here: the round knows it.
    """

    up: Counter[str] = field(default_factory=Counter)
    wire_up: Counter[str] = field(default_factory=Counter)
    wire_down: Counter[str] = field(default_factory=Counter)

    def crossed(self, client: str, up: int, down: int) -> int:
        """Count a client's activations and gradients, once; return the bytes up that are new."""
        if client in self.wire_up:
            return 0
        self.wire_up[client], self.wire_down[client] = up, down
        return up


@dataclass
class Round:
    """A round in progress: deals assignments, judges updates, aggregates what it accepted.

    The caller (an engine) trains, keeps the accepted factors wherever it likes, and hands a reader
    of them to `aggregate`, which goes site by site and client by client in the order of their ids,
    so that neither memory nor the result depends on the order in which updates came.

    `turned_away` has every answer that is not aggregated, in the order of arrival; `rejected` says
    why, per client of the round without an accepted update, by its last answer to this round.
    `traffic` and its sums, `bytes_up` and `bytes_down`, count all that travelled, also what was not
    accepted.

    What travels to and from a split client are the factors of the sites that it holds itself, and
    its activations and gradients: these are in `wire_up` and `wire_down`, and in the bytes above.

    An update that is to be shortened is kept as it came, so that a resumed run judges the same
    again; its factors are shortened where they are read.
    """

    settings: RoundSettings
    state: State
    number: int
    attempt: int
    clients: Sequence[str]
    accepted: dict[str, AcceptedUpdate] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    turned_away: list[RejectedUpdate] = field(default_factory=list)
    _traffic: Traffic = field(default_factory=Traffic)
    _dealing: RoundAssignments = field(init=False)

    def __post_init__(self) -> None:
        self._dealing = RoundAssignments(self.settings, self.state, self.number)

    def task(self, client: str) -> TrainTask:
        """Return the client's task. Clients of equal ranks share one assignment object."""
        seed = derive(self.settings.seed, self.number, self.attempt, client, "train")
        cut = self.settings.cut(client, self.number)
        return TrainTask(client, self.number, self.attempt, seed, self.assignment(client), cut)

    def assignment(self, client: str) -> Assignment:
        """Return what the rule deals this client; deterministic, so it can be asked again."""
        return self._dealing.of(client)[0]

    def assignment_hash(self, client: str) -> str:
        """Return the hash that an update of this client must carry."""
        return self._dealing.of(client)[1]

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes per client, ``up`` and ``down``: of those asked, and of others that answered."""
        asked = dict.fromkeys([*self.clients, *self._traffic.up])
        down = {
            client: self._dealing.nbytes(client) if client in self.clients else 0
            for client in asked
        }
        return {
            client: {
                "up": self._traffic.up[client],
                "down": down[client] + self._traffic.wire_down[client],
            }
            for client in asked
        }

    @property
    def bytes_up(self) -> int:
        """Bytes that arrived in this round, from whomever."""
        return self._traffic.up.total()

    @property
    def bytes_down(self) -> int:
        """Bytes that travel to all clients of the round, merged sums and gradients included."""
        return sum(map(self._dealing.nbytes, self.clients)) + self.wire_down

    @property
    def wire_up(self) -> int:
        """Bytes of activations that split clients sent."""
        return self._traffic.wire_up.total()

    @property
    def wire_down(self) -> int:
        """Bytes of gradients that split clients got."""
        return self._traffic.wire_down.total()

    @property
    def cuts(self) -> dict[str, int]:
        """How many of the clients are cut where; ``whole`` are those that are not."""
        cuts = (self.settings.cut(client, self.number) for client in self.clients)
        return dict(sorted(Counter("whole" if cut is None else str(cut) for cut in cuts).items()))

    def accept(self, update: Update) -> Update:
        """Take an update in and return what to keep of it, or raise UpdateError; never both.

        What is refused is noted with its reason. What is kept is what came, also where it counts
        shortened.
        """
        client, nbytes = update.client, self._travelled(update)
        self._traffic.up[client] += nbytes
        self._expect(update)
        crossed = self._wire(update)
        try:
            factor = self._judge(update)
        except UpdateError as error:
            self.rejected[client] = str(error)
            self.note(client, "invalid", str(error))
            raise
        self.accepted[client] = AcceptedUpdate(
            update.examples, nbytes + crossed, update.metrics, update.importance, factor
        )
        self.rejected.pop(client, None)
        return update

    def fail(self, failure: Failure) -> None:
        """Record that a client has no update to give; UpdateError if none is awaited from it."""
        self._expect(failure)
        self._wire(failure)
        self.rejected[failure.client] = failure.reason
        self.note(failure.client, failure.kind, failure.reason)

    def turn_away(self, answer: Update | Failure) -> None:
        """Count an answer that this round does not await, and its bytes, and do no more.

        Such as one that comes after its own round has ended (``stale``): whether the client has an
        update in this round is open as before.
        """
        if isinstance(answer, Update):
            self._traffic.up[answer.client] += self._travelled(answer)
        self.note(answer.client, *(self._unexpected(answer) or ("stale", "nobody waits for it")))

    def note(self, client: str, kind: Kind, reason: str, nbytes: int = 0) -> None:
        """Note that something of a client is not aggregated, and the bytes that it took."""
        self._traffic.up[client] += nbytes
        self.turned_away.append(RejectedUpdate.of(client, kind, reason))

    def _travelled(self, update: Update) -> int:
        if update.client not in self.clients:
            return update.adapter.nbytes
        held = self.settings.held(update.client, self.number)
        sent = update.adapter if held is None else within(update.adapter, held)
        return self.assignment(update.client).travelling(sent)

    def _wire(self, answer: Update | Failure) -> int:
        """Count a split client's activations and gradients, once; return the bytes up."""
        if self.settings.cut(answer.client, self.number) is None:
            return 0
        up, down = (counted(answer.metrics, name) or 0 for name in WIRE)
        new = self._traffic.crossed(answer.client, up, down)
        self._traffic.up[answer.client] += new
        return new

    def enough(self, quorum: float) -> bool:
        """Whether at least this share of the clients has an accepted update."""
        return len(self.accepted) >= quorum * len(self.clients) - 1e-9

    def _place(self, client: str) -> str:
        return f"update of client {client!r} in round {self.number}"

    def _expect(self, answer: Update | Failure) -> None:
        """Note what this round does not await, and raise UpdateError."""
        found = self._unexpected(answer)
        if found is not None:
            self.note(answer.client, *found)
            raise UpdateError(found[1])

    def _unexpected(self, answer: Update | Failure) -> tuple[Kind, str] | None:
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

    def _judge(self, update: Update) -> float:
        """Return the share of its way that counts; UpdateError unless it answers what was dealt."""
        chosen, place = self.settings, self._place(update.client)
        assignment, expected = self._dealing.of(update.client)
        split = chosen.cut(update.client, self.number) is not None
        check_update(update, assignment, expected, place, split, chosen.max_increment, chosen.sites)
        if chosen.clip_increment is None:
            return 1.0
        try:
            return clipped(update, assignment, chosen.clip_increment)[1]
        except UpdateError as error:
            raise UpdateError(f"{place}: {error}") from error

    def _counting(self, read: ReadUpdate) -> ReadUpdate:
        """Return a reader of what counts of the updates: some are shortened."""

        def shorter(client: str, site: str) -> Delta:
            came, factor = read(client, site), self.accepted[client].clipped
            if factor == 1:
                return came
            return shortened(self.assignment(client).start[site], came, factor)

        return shorter

    def aggregate(self, read: ReadUpdate) -> tuple[State, dict[str, SiteReport]]:
        """Return the next state and a report per site; RuleError if no update was accepted.

        `max_share` holds for the weights that a rule is given, and again, after a rule weighed in
        its own way, at each site among the clients that train it.
        """
        if not self.accepted:
            raise RuleError(f"round {self.number}: no update was accepted: {self.rejected}")
        rule, accepted = self.settings.rule, sorted(self.accepted)
        read, most = self._counting(read), self.settings.max_share
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
            dealt = Dealt(
                assignment.start[site],
                assignment.frozen.get(site),
                assignment.train,
                None if penalty is None else (penalty.strength, penalty.keep[site]),
            )
            yield Contribution(weight, dealt, read(client, site), client)


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
