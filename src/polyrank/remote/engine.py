"""The engine whose clients train on their own machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter
from polyrank.data import sizes
from polyrank.errors import PacketError, SplitServerError
from polyrank.model import LoadedModel
from polyrank.protocol import SizeLimits, TrainRequest, read_answer, write_order
from polyrank.remote.message_channel import Message, MessageChannel, Reply
from polyrank.remote.progress import AnswerProgress
from polyrank.rounds.engine import CutOf, OnStep
from polyrank.rounds.messages import Failure, FailureKind, TrainTask
from polyrank.split_server.interface import ClientStatus, OpenRound, SplitServerHandle
from polyrank.training import Job, LocalTraining, Scoring
from polyrank.training.client_data import ClientWork, everywhere
from polyrank.training.split import ServerPartJob, SplitJob, SplitSettings
from polyrank.transport.remote.credentials import Credentials

LONGEST = 24 * 3600.0
"""Seconds that an answer may take where the round has no deadline."""
PATIENCE = 3.0
"""So many deadlines after it was asked, a client that was late is not listened to any more."""


@dataclass(frozen=True)
class Asked:
    """A task that was sent, and what its answer may be."""

    task: TrainTask
    own: Assignment
    sent: float

    @property
    def client(self) -> str:
        """Who was asked."""
        return self.task.client

    def light(self) -> Asked:
        """Return it without what is merged into the base, which is large and not answered."""
        own = replace(self.own, merged=Adapter({}))
        return Asked(replace(self.task, assignment=own), own, self.sent)


class RemoteEngine:
    """Sends tasks to the clients' machines and takes in what comes back.

    `homes` says which machine hosts a client, `work` how much data it has. With `deadline` the
    clients of a round have so many seconds; who has not answered then is late, and what comes of it
    in later rounds is passed on as the answer to an earlier one. A split client's tail is trained
    by the `desk`, whose part is put together with the client's when its answer comes. `tell` is
    told what happens as it happens.

    Orders are made one by one as they are sent, and answers are passed on one by one as they come;
    those to clients that share an adapter at the server are kept until all of them have answered.
    """

    cohort = 1

    def __init__(
        self,
        post: MessageChannel,
        homes: Mapping[str, int],
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        local: LocalTraining,
        split: SplitSettings,
        deadline: float | None = None,
        desk: SplitServerHandle | None = None,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._post, self._homes, self._desk, self._tell = post, homes, desk, tell
        self._clock = clock
        self._model, self._work, self._local, self._split = model, work, local, split
        self._seconds = deadline or LONGEST
        self.scoring = Scoring(0)
        self._late: dict[str, Asked] = {}

    def cohorts(self, clients: Sequence[str], cut_of: CutOf) -> list[list[str]]:
        """Return each client on its own, but those that share one adapter at the server as one."""
        together = [id for id in clients if cut_of(id) is not None]
        if self._split.adapters != "shared" or not together:
            return [[id] for id in clients]
        together.sort(key=lambda id: (str(cut_of(id)), id))  # The order in which they take turns.
        return [[id] for id in clients if id not in together] + [together]

    def close(self) -> None:
        """Stop the split server, if there is one."""
        if self._desk is not None:
            self._desk.stop()

    def run(
        self, groups: Sequence[Sequence[TrainTask]], on_step: OnStep
    ) -> Iterator[Update | Failure]:
        """Yield the answers as they come, and failures of those that are lost or late."""
        tasks = [task for group in groups for task in group]
        if not tasks:
            return
        split = [task for task in tasks if task.cut is not None]
        try:
            accesses = self._opened(split)
            yield from self._round(tasks, accesses, on_step)
        finally:
            if split and self._desk is not None:
                self._desk.close()

    def _round(
        self,
        tasks: Sequence[TrainTask],
        accesses: Mapping[str, Credentials | str],
        on_step: OnStep,
    ) -> Iterator[Update | Failure]:
        began = self._clock()
        self._forget(began)
        waiting: dict[str, Asked] = {}
        for one, ticket in self._sent(tasks, accesses):
            if ticket is not None:
                waiting[ticket] = one
                continue
            reason = accesses.get(one.client)
            why = reason if isinstance(reason, str) else "its machine cannot be reached"
            self._tell(f"{one.client}: {why}")
            self._leave(one)
            yield self._failure(one, why, "lost")
        self._tell(f"asked {len(waiting)} clients: {_names(waiting.values())}")
        together: list[tuple[Asked, Update]] = []
        watch, over = AnswerProgress(began), False
        while waiting and not over:  # What has come by the deadline is looked at, at least once.
            over = self._clock() - began >= self._seconds
            if on_step is not None:
                on_step()
            tickets = {t: self._homes[one.client] for t, one in (self._late | waiting).items()}
            for delivery in self._post.receive(tickets):
                if delivery.ticket in self._late:
                    answer = self._read(self._late.pop(delivery.ticket), delivery)
                    self._tell(f"{answer.client}: an answer to round {answer.round} came too late")
                    yield answer
                    continue
                one = waiting.pop(delivery.ticket)
                watch.answered(self._clock())
                answer = self._read(one, delivery)
                self._tell(self._told(one, answer, delivery, self._clock() - began))
                if isinstance(answer, Update) and one.task.cut is not None:
                    if self._split.adapters == "shared":  # Trained on while others are at work.
                        together.append((one, answer))
                        continue
                    answer = self._whole(one, answer)
                else:
                    self._leave(one)
                yield answer
            names = [one.client for one in waiting.values()]
            for line in watch.lines(self._clock(), names, self._status()):
                self._tell(line)
        for ticket, one in waiting.items():
            self._late[ticket] = one.light()
            self._leave(one)
            self._tell(f"{one.client}: no answer within {self._seconds:.0f} s")
            yield self._failure(one, f"no answer within {self._seconds:.0f} s", "late")
        for one, update in together:
            yield self._whole(one, update)

    def _status(self) -> Mapping[str, ClientStatus]:
        return {} if self._desk is None else self._desk.status()

    def _leave(self, one: Asked) -> None:
        """Give up the tail of a client without a usable answer, so that no other waits for it."""
        if one.task.cut is not None and self._desk is not None:
            self._desk.leave(one.client)

    def _forget(self, now: float) -> None:
        """Listen no more to clients that were late long ago: their machines may be gone."""
        oldest = now - PATIENCE * self._seconds
        self._late = {t: one for t, one in self._late.items() if one.sent > oldest}

    # --- what is sent ---

    def _job(self, task: TrainTask) -> Job:
        """The client's work; its examples are on its machine, and only counted here."""
        return Job(
            task.client,
            everywhere(task.assignment, self._model.spec),
            self._work[task.client].rows["train"],
            self._local,
            task.seed,
            self.scoring,
        )

    def _opened(self, tasks: Sequence[TrainTask]) -> Mapping[str, Credentials | str]:
        """Return how the split clients reach their tails, or why they cannot."""
        if not tasks:
            return {}
        if self._desk is None:
            raise SplitServerError("a client's model is cut, and there is no split server")
        jobs = [self._tail_job(task) for task in tasks]
        tokens = {
            task.client: self._local.batch
            * max(size.tokens for size in sizes(self._work[task.client].rows["train"]))
            for task in tasks
        }
        first = tasks[0]
        merged = first.assignment.merged
        work = OpenRound(first.round, first.attempt, jobs, merged, tokens, self._seconds)
        return self._desk.open(work)

    def _tail_job(self, task: TrainTask) -> ServerPartJob:
        if task.cut is None:
            raise SplitServerError(f"client {task.client!r}: it is not cut, so it has no tail")
        whole = SplitJob(self._job(task), task.cut, task.round, task.attempt)
        tail = whole.at_server(self._model)
        return replace(tail, assignment=replace(tail.assignment, merged=Adapter({})))

    def _sent(
        self, tasks: Sequence[TrainTask], accesses: Mapping[str, Credentials | str]
    ) -> list[tuple[Asked, str | None]]:
        """Send every client's order; return what was asked, each with its ticket if it went."""
        now = self._clock()
        asked = [Asked(task, self._own(task), now) for task in tasks]
        open_ = [one for one in asked if not isinstance(accesses.get(one.client), str)]
        letters = (self._letter(one, accesses.get(one.client)) for one in open_)
        tickets = self._post.send(letters, self._seconds)
        by_client = {one.client: t for one, t in zip(open_, tickets, strict=True)}
        return [(one, by_client.get(one.client)) for one in asked]

    def _letter(self, one: Asked, access: Credentials | str | None) -> Message:
        order = TrainRequest(
            replace(one.task, assignment=one.own),
            one.task.assignment.hash(),
            self.scoring.every,
            self.scoring.metric,
            self._seconds,
            None if isinstance(access, str) else access,
        )
        return Message(self._homes[one.client], "train", write_order(order))

    def _own(self, task: TrainTask) -> Assignment:
        """Return what is sent of an assignment: that of the sites that the client holds."""
        if task.cut is None:
            return task.assignment
        spec, held = self._model.spec, task.cut.at_client(self._model.spec.blocks)
        return task.assignment.only({site.name for site in spec.sites if site.block in held})

    # --- what comes back ---

    def _read(self, one: Asked, delivery: Reply) -> Update | Failure:
        """Return the answer that came to a task, or a failure that says why it is none."""
        if delivery.payload is None:
            return self._failure(one, delivery.lost or "its machine gave no answer", "lost")
        try:
            answer = read_answer(delivery.payload, self._bounds(one), one.own)
        except PacketError as error:
            return self._failure(one, str(error), "invalid")
        if answer.client != one.client:
            return self._failure(one, f"it answers as client {answer.client!r}", "invalid")
        asked = (one.task.round, one.task.attempt)
        if (answer.round, answer.attempt) != asked:
            return self._failure(
                one,
                f"it was asked in round {asked[0]}, attempt {asked[1]}, and answers round "
                f"{answer.round}, attempt {answer.attempt}",
                "invalid",
            )
        return answer

    def _bounds(self, one: Asked) -> SizeLimits:
        return SizeLimits.of(one.own, len(self._model.spec.sites))

    def _whole(self, one: Asked, update: Update) -> Update | Failure:
        """Return a split client's update with what the split server trained for it."""
        if self._desk is None:
            raise SplitServerError("a client's model is cut, and there is no split server")
        try:
            tail = self._desk.collect(one.client)
        except SplitServerError as error:
            self._tell(f"{one.client}: {error}")
            self._leave(one)
            return self._failure(one, str(error), "lost")
        sites = one.task.assignment.start
        both = Adapter({**update.adapter, **tail.adapter})
        traffic = {"wire_up": float(tail.traffic.up), "wire_down": float(tail.traffic.down)}
        return replace(
            update,
            adapter=both.restrict([site for site in sites if site in both]),
            metrics={**update.metrics, **traffic},
            importance={**update.importance, **tail.importance},
        )

    def _failure(self, one: Asked, reason: str, kind: FailureKind) -> Failure:
        task = one.task
        return Failure(task.client, task.round, task.attempt, reason, kind=kind)

    def _told(self, one: Asked, answer: Update | Failure, delivery: Reply, seconds: float) -> str:
        if isinstance(answer, Failure):
            return f"{one.client}: {answer.kind} after {seconds:.1f} s: {answer.reason}"
        size = len(delivery.payload or b"") / 2**20
        loss = answer.metrics.get("loss", float("nan"))
        return f"{one.client}: update of {size:.2f} MiB after {seconds:.1f} s, loss {loss:.4f}"


def _names(asked: Iterable[Asked]) -> str:
    return ", ".join(sorted(one.client for one in asked))
