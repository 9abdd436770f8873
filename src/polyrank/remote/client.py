"""A client's machine: how it answers the server's messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from polyrank.aggregation import Update
from polyrank.codecs import codec
from polyrank.data import Encoded, sizes
from polyrank.errors import DataError, FrameError, PolyrankError
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery, LocalEvaluator
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint, DeviceProfile
from polyrank.protocol.client_info import (
    ANYTHING,
    PARTS,
    ClientInfo,
    ClientPolicy,
    Counts,
    NodeInfo,
    write_node_info,
)
from polyrank.protocol.evaluate import read_evaluate_request, write_client_metrics
from polyrank.protocol.train_request import TrainRequest, read_train_request
from polyrank.protocol.train_result import write_train_result
from polyrank.remote.message_channel import Kind
from polyrank.rounds.messages import Failure, FailureKind
from polyrank.run.engine import InProcessEngine
from polyrank.run.environment import PACKAGES, config_fingerprint
from polyrank.training import Job, LocalTraining, Scoring, Trained
from polyrank.training.client_data import ClientWork, Part, everywhere, fingerprint
from polyrank.training.split import SplitJob, SplitSettings, train_client_part
from polyrank.transport import FrameLimits


class ModelLoader(Protocol):
    """Loads the model, or a part of it, on a client's machine."""

    def bare(self) -> LoadedModel:
        """Return it without weights: its tokenizer and its sizes."""
        ...

    def full(self) -> LoadedModel:
        """Return all of it."""
        ...

    def client_part(self, cut: CutPoint) -> LoadedModel:
        """Return the blocks that a client of this cut runs."""
        ...


class PolicyRefusal(Exception):
    """The request goes beyond what the machine's owner consents to."""


class DeadlinePassed(Exception):
    """The round's deadline has passed while the client was training."""


@dataclass
class ClientNode:
    """A machine with its clients' data: it answers packets with packets.

    `prepare` gives the work of its clients with a model's tokenizer; nothing of it leaves the
    machine but counts, scores and updates. `policy` is what the machine's owner consents to; a
    request beyond it is refused.

    Whatever goes wrong with one client's work becomes an answer that names it, without any of the
    client's data.
    """

    models: ModelLoader
    prepare: Callable[[LoadedModel], Mapping[str, ClientWork]]
    local: LocalTraining
    split: SplitSettings
    evaluation: Evaluation
    policy: ClientPolicy = ANYTHING
    device: DeviceProfile | None = None

    def answer(self, kind: Kind, payload: bytes) -> bytes:
        """Return the packet that answers one; PolyrankError for one that cannot be read."""
        if kind == "hello":
            return write_node_info(self.info())
        if kind == "evaluate":
            return write_client_metrics(self.evaluate(read_evaluate_request(payload).queries))
        request = read_train_request(payload)
        return write_train_result(self.train(request), request.task.assignment)

    # --- hello ---

    def info(self) -> NodeInfo:
        """Return which clients are here and how much data they have; never what is in it."""
        model = self.models.bare()
        versions = {name: metadata.version(name) for name in PACKAGES}
        versions["model"] = config_fingerprint(model)
        work = self.prepare(model)
        least = self.policy.smallest_count
        if any(client.seen and len(client.rows["train"]) < least for client in work.values()):
            return NodeInfo((), self.device, self.policy, versions, _too_few(least))
        clients = tuple(self._client_info(client) for client in work.values())
        return NodeInfo(clients, self.device, self.policy, versions)

    def _client_info(self, client: ClientWork) -> ClientInfo:
        counts = {part: self._counts(client, part) for part in PARTS}
        return ClientInfo(
            client.id, client.category, client.seen, counts, fingerprint({client.id: client})
        )

    def _counts(self, client: ClientWork, part: Part) -> Counts:
        if not self._enough(client, part):
            return Counts(0, 0, 0)
        rows = list(sizes(client.rows[part]))
        return Counts(
            len(rows),
            max((size.tokens for size in rows), default=0),
            max((size.targets for size in rows), default=0),
        )

    def _enough(self, client: ClientWork, part: Part, most: int | None = None) -> bool:
        """Whether a count or score of a part stands on as many examples as the owner wants.

        A score is of the first `most` examples of a part, or of all.
        """
        there = len(client.rows[part])
        used = there if most is None else min(most, there)
        return used >= self.policy.smallest_count

    # --- train ---

    def train(self, request: TrainRequest) -> Update | Failure:
        """Carry a request out; the result is a failure if something keeps it from being done."""
        task = request.task

        def failure(reason: str, kind: FailureKind = "failed") -> Failure:
            return Failure(task.client, task.round, task.attempt, reason, kind=kind)

        try:
            self._check_policy(request)
            return (
                self._train_client_part(request)
                if task.cut is not None
                else self._train_full(request)
            )
        except PolicyRefusal as error:
            return failure(str(error), "refused")
        except DeadlinePassed:
            return failure("its deadline passed while it was training", "late")
        except PolyrankError as error:
            return failure(str(error))
        except Exception as error:  # Its text may hold what must stay here.
            return failure(f"{type(error).__name__} on the client's machine; see its own log")

    def _check_policy(self, request: TrainRequest) -> None:
        """Raise PolicyRefusal for a rank, a cut or labels that the owner does not consent to."""
        task, policy = request.task, self.policy
        ranks = task.assignment.ranks
        highest = max(ranks.values(), default=0)
        if policy.largest_rank is not None and highest > policy.largest_rank:
            site = max(ranks, key=lambda name: ranks[name])
            raise PolicyRefusal(
                f"limits.largest_rank = {policy.largest_rank}, and it was sent rank {highest} at "
                f"{site}; give it a smaller type, or raise the limit"
            )
        if task.cut is None:
            return
        if policy.lowest_cut is not None and task.cut.lower < policy.lowest_cut:
            raise PolicyRefusal(
                f"limits.lowest_cut = {policy.lowest_cut}, and its model is cut at "
                f"{task.cut.lower}; cut it higher, or lower the limit"
            )
        if not policy.labels_may_leave and task.cut.upper is None:
            raise PolicyRefusal(
                f"limits.labels_may_leave = false, and with the cut at {task.cut} its labels would "
                "leave; cut it in a U-shape"
            )

    def _train_full(self, request: TrainRequest) -> Update | Failure:
        """Train the whole model, as the engine in one process does with a cohort of one."""
        task, model = request.task, self.models.full()
        work = self._work_of(task.client, model)
        engine = InProcessEngine(model, work, self.local, 1, self.split)
        engine.scoring = Scoring(request.score_every, request.metric)
        (result,) = engine.execute([task], self._until_deadline(request))
        return result

    def _train_client_part(self, request: TrainRequest) -> Update | Failure:
        """Train the blocks that are here against the server that holds the others."""
        from polyrank.transport.remote import GrpcLink  # Optional: split clients alone need it.

        task = request.task
        if task.cut is None or request.access is None:
            return Failure(task.client, task.round, task.attempt, "it has no way to its tail")
        model = self.models.client_part(task.cut)
        rows = self._work_of(task.client, model)[task.client].rows["train"]
        self._check_limits(request.access.limits, model, rows)
        assignment = everywhere(task.assignment, model.spec)
        scoring = Scoring(request.score_every, request.metric)
        job = Job(task.client, assignment, rows, self.local, task.seed, scoring)
        split_job = SplitJob(job, task.cut, task.round, task.attempt)
        began = time.perf_counter()
        trained: Trained = train_client_part(
            model,
            split_job,
            GrpcLink(request.access),
            self.split,
            on_step=self._until_deadline(request),
        )
        if trained.failure is not None:
            return Failure(task.client, task.round, task.attempt, trained.failure, trained.metrics)
        return Update(
            client=task.client,
            round=task.round,
            attempt=task.attempt,
            assignment=request.assignment,
            examples=len(rows),
            adapter=trained.adapter.restrict(task.assignment.start).to(device="cpu"),
            metrics={**trained.metrics, "seconds": time.perf_counter() - began},
            importance=trained.importance,
        )

    def _check_limits(
        self, limits: FrameLimits, model: LoadedModel, rows: Sequence[Encoded]
    ) -> None:
        """Raise FrameError unless frames are as large as this client's work makes them."""
        most = self.local.batch * max(size.tokens for size in sizes(rows))
        wanted = codec(self.split.wire)
        if (limits.width, limits.codec) != (model.spec.hidden, wanted) or limits.tokens > most:
            raise FrameError(
                f"its tail: expected frames of {model.spec.hidden} numbers a token in "
                f"{self.split.wire} and up to {most} tokens, got {limits.width} in "
                f"{limits.codec.name} and {limits.tokens}; server and client read other recipes"
            )

    def _work_of(self, client: str, model: LoadedModel) -> Mapping[str, ClientWork]:
        work = self.prepare(model)
        if client not in work:
            raise DataError(f"client {client!r}: it is not on this machine; here is {[*work]}")
        if not self._enough(work[client], "train"):
            raise PolicyRefusal(_too_few(self.policy.smallest_count))
        return work

    def _until_deadline(self, request: TrainRequest) -> Callable[[], None]:
        """Return what ends training once the request's seconds are over."""
        until = time.monotonic() + request.seconds

        def check() -> None:
            if time.monotonic() > until:
                raise DeadlinePassed

        return check

    # --- evaluate ---

    def evaluate(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return the scores that are asked for, of parts with enough examples to tell them."""
        model = self.models.full()
        work = self.prepare(model)
        settings, permitted = self.evaluation, []
        for query in queries:
            here = [work[id] for id in query.clients if id in work]
            clients = tuple(
                client.id
                for client in here
                if self._enough(client, query.part, settings.examples or None)
            )
            texts = query.texts and all(
                self._enough(client, query.part, settings.generate) for client in here
            )
            permitted.append(EvaluateQuery(query.adapter, clients, query.part, texts))
        return LocalEvaluator(model, work, settings).evaluate(permitted)


def _too_few(least: int) -> str:
    return f"limits.smallest_count = {least}, and it has fewer training examples"
