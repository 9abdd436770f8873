"""The engine whose clients train on their own machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter
from polyrank.data import sizes
from polyrank.errors import PacketError, SplitServerError
from polyrank.model import LoadedModel
from polyrank.protocol.size_limits import SizeLimits
from polyrank.protocol.train_request import TrainRequest, write_train_request
from polyrank.protocol.train_result import read_train_result
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
"""Seconds that a reply may take where the round has no deadline."""
PATIENCE = 3.0
"""So many deadlines after its request, a late client's reply is not waited for any more."""


@dataclass(frozen=True)
class SentTask:
    """A task that was sent to a machine, and the assignment that its result is checked against.

    `own` is what the client holds of the task's assignment, `time` when it was sent.
    """

    task: TrainTask
    own: Assignment
    time: float

    @property
    def client(self) -> str:
        """The client that was asked."""
        return self.task.client

    def without_merged(self) -> SentTask:
        """Return it without what is merged into the base, which is large and not in a result."""
        own = replace(self.own, merged=Adapter({}))
        return SentTask(replace(self.task, assignment=own), own, self.time)


class RemoteEngine:
    """Sends tasks to the clients' machines and takes in their results.

    `node_of` says which machine hosts a client, `work` how much data it has. With `deadline` the
    clients of a round have so many seconds; a client that has not answered then is late, and its
    result, if it comes in a later round, is passed on as the result of the earlier one. The server
    trains its part of a split client's model on the `split_server`; it is put together with the
    client's when its result comes. `tell` is told what happens as it happens.

    Requests are made one by one as they are sent, and results are passed on one by one as they
    come; those of clients that share an adapter at the server are kept until all have come.
    """

    cohort = 1

    def __init__(
        self,
        channel: MessageChannel,
        node_of: Mapping[str, int],
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        local: LocalTraining,
        split: SplitSettings,
        deadline: float | None = None,
        split_server: SplitServerHandle | None = None,
        tell: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._channel, self._node_of = channel, node_of
        self._split_server, self._tell = split_server, tell
        self._clock = clock
        self._model, self._work, self._local, self._split = model, work, local, split
        self._seconds = deadline or LONGEST
        self.scoring = Scoring(0)
        self._late: dict[str, SentTask] = {}

    def cohorts(self, clients: Sequence[str], cut_of: CutOf) -> list[list[str]]:
        """Return each client on its own, but those that share one adapter at the server as one."""
        together = [id for id in clients if cut_of(id) is not None]
        if self._split.adapters != "shared" or not together:
            return [[id] for id in clients]
        together.sort(key=lambda id: (str(cut_of(id)), id))  # The order in which they take turns.
        return [[id] for id in clients if id not in together] + [together]

    def close(self) -> None:
        """Stop the split server, if there is one."""
        if self._split_server is not None:
            self._split_server.stop()

    def run(
        self, groups: Sequence[Sequence[TrainTask]], on_step: OnStep
    ) -> Iterator[Update | Failure]:
        """Yield the results as they come, and failures of those that are lost or late."""
        tasks = [task for group in groups for task in group]
        if not tasks:
            return
        split = [task for task in tasks if task.cut is not None]
        try:
            credentials = self._opened(split)
            yield from self._round(tasks, credentials, on_step)
        finally:
            if split and self._split_server is not None:
                self._split_server.close()

    def _round(
        self,
        tasks: Sequence[TrainTask],
        credentials: Mapping[str, Credentials | str],
        on_step: OnStep,
    ) -> Iterator[Update | Failure]:
        began = self._clock()
        self._forget(began)
        waiting: dict[str, SentTask] = {}
        for sent, message_id in self._sent(tasks, credentials):
            if message_id is not None:
                waiting[message_id] = sent
                continue
            reason = credentials.get(sent.client)
            why = reason if isinstance(reason, str) else "its machine cannot be reached"
            self._tell(f"{sent.client}: {why}")
            self._leave(sent)
            yield self._failure(sent, why, "lost")
        names = ", ".join(sorted(sent.client for sent in waiting.values()))
        self._tell(f"asked {len(waiting)} clients: {names}")
        together: list[tuple[SentTask, Update]] = []
        progress, over = AnswerProgress(began), False
        while waiting and not over:  # What has come by the deadline is read, at least once.
            over = self._clock() - began >= self._seconds
            if on_step is not None:
                on_step()
            nodes = {m: self._node_of[sent.client] for m, sent in (self._late | waiting).items()}
            for reply in self._channel.receive(nodes):
                if reply.message_id in self._late:
                    result = self._read(self._late.pop(reply.message_id), reply)
                    self._tell(f"{result.client}: an answer to round {result.round} came too late")
                    yield result
                    continue
                sent = waiting.pop(reply.message_id)
                progress.answered(self._clock())
                result = self._read(sent, reply)
                self._tell(self._described(sent, result, reply, self._clock() - began))
                if isinstance(result, Update) and sent.task.cut is not None:
                    if self._split.adapters == "shared":  # Trained on while others are at work.
                        together.append((sent, result))
                        continue
                    result = self._with_server_part(sent, result)
                else:
                    self._leave(sent)
                yield result
            clients = [sent.client for sent in waiting.values()]
            for line in progress.lines(self._clock(), clients, self._status()):
                self._tell(line)
        for message_id, sent in waiting.items():
            self._late[message_id] = sent.without_merged()
            self._leave(sent)
            self._tell(f"{sent.client}: no answer within {self._seconds:.0f} s")
            yield self._failure(sent, f"no answer within {self._seconds:.0f} s", "late")
        for sent, update in together:
            yield self._with_server_part(sent, update)

    def _status(self) -> Mapping[str, ClientStatus]:
        return {} if self._split_server is None else self._split_server.status()

    def _leave(self, sent: SentTask) -> None:
        """Give up the server's part of a client without a usable result; no other waits for it."""
        if sent.task.cut is not None and self._split_server is not None:
            self._split_server.leave(sent.client)

    def _forget(self, now: float) -> None:
        """Forget clients that were late long ago: their machines may be gone."""
        oldest = now - PATIENCE * self._seconds
        self._late = {m: sent for m, sent in self._late.items() if sent.time > oldest}

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
        """Open the split server's round; return each client's credentials, or why it has none."""
        if not tasks:
            return {}
        if self._split_server is None:
            raise SplitServerError("a client's model is cut, and there is no split server")
        jobs = [self._server_job(task) for task in tasks]
        tokens = {
            task.client: self._local.batch
            * max(size.tokens for size in sizes(self._work[task.client].rows["train"]))
            for task in tasks
        }
        first = tasks[0]
        merged = first.assignment.merged
        work = OpenRound(first.round, first.attempt, jobs, merged, tokens, self._seconds)
        return self._split_server.open(work)

    def _server_job(self, task: TrainTask) -> ServerPartJob:
        if task.cut is None:
            raise SplitServerError(f"client {task.client!r}: it is not cut, so it has no tail")
        whole = SplitJob(self._job(task), task.cut, task.round, task.attempt)
        job = whole.at_server(self._model)
        return replace(job, assignment=replace(job.assignment, merged=Adapter({})))

    def _sent(
        self, tasks: Sequence[TrainTask], credentials: Mapping[str, Credentials | str]
    ) -> list[tuple[SentTask, str | None]]:
        """Send every client's request; return each task with its message's id if it went."""
        now = self._clock()
        tasks_sent = [SentTask(task, self._own(task), now) for task in tasks]
        open_ = [sent for sent in tasks_sent if not isinstance(credentials.get(sent.client), str)]
        messages = (self._message(sent, credentials.get(sent.client)) for sent in open_)
        ids = self._channel.send(messages, self._seconds)
        by_client = {sent.client: m for sent, m in zip(open_, ids, strict=True)}
        return [(sent, by_client.get(sent.client)) for sent in tasks_sent]

    def _message(self, sent: SentTask, credentials: Credentials | str | None) -> Message:
        request = TrainRequest(
            replace(sent.task, assignment=sent.own),
            sent.task.assignment.hash(),
            self.scoring.every,
            self.scoring.metric,
            self._seconds,
            None if isinstance(credentials, str) else credentials,
        )
        return Message(self._node_of[sent.client], "train", write_train_request(request))

    def _own(self, task: TrainTask) -> Assignment:
        """Return what is sent of an assignment: that of the sites that the client holds."""
        if task.cut is None:
            return task.assignment
        spec, blocks = self._model.spec, task.cut.at_client(self._model.spec.blocks)
        return task.assignment.only({site.name for site in spec.sites if site.block in blocks})

    # --- what comes back ---

    def _read(self, sent: SentTask, reply: Reply) -> Update | Failure:
        """Return the result that came of a task, or a failure that says why it is none."""
        if reply.payload is None:
            return self._failure(sent, reply.error or "its machine gave no answer", "lost")
        limits = SizeLimits.of(sent.own, len(self._model.spec.sites))
        try:
            result = read_train_result(reply.payload, limits, sent.own)
        except PacketError as error:
            return self._failure(sent, str(error), "invalid")
        if result.client != sent.client:
            return self._failure(sent, f"it answers as client {result.client!r}", "invalid")
        asked = (sent.task.round, sent.task.attempt)
        if (result.round, result.attempt) != asked:
            return self._failure(
                sent,
                f"it was asked in round {asked[0]}, attempt {asked[1]}, and answers round "
                f"{result.round}, attempt {result.attempt}",
                "invalid",
            )
        return result

    def _with_server_part(self, sent: SentTask, update: Update) -> Update | Failure:
        """Return a split client's update with what the split server trained for it."""
        if self._split_server is None:
            raise SplitServerError("a client's model is cut, and there is no split server")
        try:
            part = self._split_server.collect(sent.client)
        except SplitServerError as error:
            self._tell(f"{sent.client}: {error}")
            self._leave(sent)
            return self._failure(sent, str(error), "lost")
        sites = sent.task.assignment.start
        both = Adapter({**update.adapter, **part.adapter})
        traffic = {"wire_up": float(part.traffic.up), "wire_down": float(part.traffic.down)}
        return replace(
            update,
            adapter=both.restrict([site for site in sites if site in both]),
            metrics={**update.metrics, **traffic},
            importance={**update.importance, **part.importance},
        )

    def _failure(self, sent: SentTask, reason: str, kind: FailureKind) -> Failure:
        task = sent.task
        return Failure(task.client, task.round, task.attempt, reason, kind=kind)

    def _described(
        self, sent: SentTask, result: Update | Failure, reply: Reply, seconds: float
    ) -> str:
        """Return a line that says what came of a task, and when."""
        if isinstance(result, Failure):
            return f"{sent.client}: {result.kind} after {seconds:.1f} s: {result.reason}"
        size = len(reply.payload or b"") / 2**20
        loss = result.metrics.get("loss", float("nan"))
        return f"{sent.client}: update of {size:.2f} MiB after {seconds:.1f} s, loss {loss:.4f}"
