"""What a client's machine does with the messages that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from polyrank.protocol import (
    ClientInfo,
    ClientPolicy,
    Counts,
    Profile,
    TrainRequest,
    read_exam,
    read_order,
    write_answer,
    write_marks,
    write_profile,
)
from polyrank.remote.message_channel import Kind
from polyrank.remote.registration import PARTS
from polyrank.rounds.messages import Failure, FailureKind
from polyrank.run.engine import InProcessEngine
from polyrank.run.environment import PACKAGES, config_fingerprint
from polyrank.training import Job, LocalTraining, Scoring, Trained
from polyrank.training.client_data import ClientWork, Part, everywhere, fingerprint
from polyrank.training.split import SplitJob, SplitSettings, train_client_part
from polyrank.transport import FrameLimits


class Models(Protocol):
    """How a machine comes by the model."""

    def bare(self) -> LoadedModel:
        """Return it without weights: its tokenizer and its sizes."""
        ...

    def whole(self) -> LoadedModel:
        """Return all of it."""
        ...

    def head(self, cut: CutPoint) -> LoadedModel:
        """Return the blocks that a client of this cut runs."""
        ...


class Refused(Exception):
    """The machine's owner does not consent to what is asked."""


class Late(Exception):
    """The round's deadline has passed while the client was training."""


@dataclass
class ClientSide:
    """A machine with its clients' data: packets in, packets out.

    `prepare` gives the work of its clients with a model's tokenizer. But counts, scores and updates
    nothing of it leaves. `terms` are the bounds that the machine's owner has set; an order beyond
    them is refused.

    Whatever goes wrong with one client's work becomes an answer that names it, without any of the
    client's data.
    """

    models: Models
    prepare: Callable[[LoadedModel], Mapping[str, ClientWork]]
    local: LocalTraining
    split: SplitSettings
    evaluation: Evaluation
    terms: ClientPolicy = field(default_factory=ClientPolicy)
    device: DeviceProfile | None = None

    def answer(self, kind: Kind, payload: bytes) -> bytes:
        """Return the packet that answers one; PolyrankError for one that cannot be read."""
        if kind == "hello":
            return write_profile(self.profile())
        if kind == "evaluate":
            return write_marks(self.marks(read_exam(payload).questions))
        order = read_order(payload)
        return write_answer(self.trained(order), order.task.assignment)

    # --- who is here ---

    def profile(self) -> Profile:
        """Return who is here and how much data there is; never what is in it."""
        model = self.models.bare()
        versions = {name: metadata.version(name) for name in PACKAGES}
        versions["model"] = config_fingerprint(model)
        work = self.prepare(model)
        least = self.terms.smallest_count
        few = [id for id, one in work.items() if one.seen and len(one.rows["train"]) < least]
        if few:
            return Profile(
                (),
                self.device,
                self.terms,
                versions,
                _too_few(least),
            )
        hosted = tuple(self._hosted(client) for client in work.values())
        return Profile(hosted, self.device, self.terms, versions)

    def _hosted(self, client: ClientWork) -> ClientInfo:
        counts = {part: self._counts(client, part) for part in PARTS}
        print_ = fingerprint({client.id: client})
        return ClientInfo(client.id, client.category, client.seen, counts, print_)

    def _counts(self, client: ClientWork, part: Part) -> Counts:
        rows = client.rows[part]
        if not self._enough(client, part):
            return Counts(0, 0, 0)
        found = list(sizes(rows))
        return Counts(
            len(found),
            max((size.tokens for size in found), default=0),
            max((size.targets for size in found), default=0),
        )

    def _enough(self, client: ClientWork, part: Part, most: int | None = None) -> bool:
        """Whether so many examples are used as the owner wants a count or score to stand on.

        A score is of the first `most` examples of a part, or of all.
        """
        there = len(client.rows[part])
        used = there if most is None else min(most, there)
        return used >= self.terms.smallest_count

    # --- training ---

    def trained(self, order: TrainRequest) -> Update | Failure:
        """Carry an order out; what keeps it from being done is the answer then."""
        task = order.task

        def failure(reason: str, kind: FailureKind = "failed") -> Failure:
            return Failure(task.client, task.round, task.attempt, reason, kind=kind)

        try:
            refusal = self._refusal(order)
            if refusal is not None:
                return failure(refusal, "refused")
            return self._split(order) if task.cut is not None else self._own(order)
        except Refused as error:
            return failure(str(error), "refused")
        except Late:
            return failure("its deadline passed while it was training", "late")
        except PolyrankError as error:
            return failure(str(error))
        except Exception as error:  # Its text may hold what must stay here.
            return failure(f"{type(error).__name__} on the client's machine; see its own log")

    def _refusal(self, order: TrainRequest) -> str | None:
        task, terms = order.task, self.terms
        ranks = task.assignment.ranks
        highest = max(ranks.values(), default=0)
        if terms.largest_rank is not None and highest > terms.largest_rank:
            site = max(ranks, key=lambda name: ranks[name])
            return (
                f"limits.largest_rank = {terms.largest_rank}, and it was dealt rank {highest} at "
                f"{site}; give it a smaller type, or raise the limit"
            )
        if task.cut is None:
            return None
        if terms.lowest_cut is not None and task.cut.lower < terms.lowest_cut:
            return (
                f"limits.lowest_cut = {terms.lowest_cut}, and its model is cut at "
                f"{task.cut.lower}; cut it higher, or lower the limit"
            )
        if not terms.labels_may_leave and task.cut.upper is None:
            return (
                f"limits.labels_may_leave = false, and with the cut at {task.cut} its labels would "
                "leave; cut it in a U-shape"
            )
        return None

    def _own(self, order: TrainRequest) -> Update | Failure:
        """Train the whole model, as the engine in one process does with a cohort of one."""
        task, model = order.task, self.models.whole()
        work = self._work_of(task.client, model)
        engine = InProcessEngine(model, work, self.local, 1, self.split)
        engine.scoring = Scoring(order.score_every, order.metric)
        (answer,) = engine.execute([task], self._until(order))
        return answer

    def _split(self, order: TrainRequest) -> Update | Failure:
        """Train the blocks that are here against the server that holds the others."""
        from polyrank.transport.remote import GrpcLink  # Optional: split clients alone need it.

        task = order.task
        if task.cut is None or order.access is None:
            return Failure(task.client, task.round, task.attempt, "it has no way to its tail")
        model = self.models.head(task.cut)
        rows = self._work_of(task.client, model)[task.client].rows["train"]
        self._check_limits(order.access.limits, model, rows)
        dealt = everywhere(task.assignment, model.spec)
        scoring = Scoring(order.score_every, order.metric)
        job = Job(task.client, dealt, rows, self.local, task.seed, scoring)
        asked = SplitJob(job, task.cut, task.round, task.attempt)
        began = time.perf_counter()
        trained: Trained = train_client_part(
            model, asked, GrpcLink(order.access), self.split, on_step=self._until(order)
        )
        if trained.failure is not None:
            return Failure(task.client, task.round, task.attempt, trained.failure, trained.metrics)
        return Update(
            client=task.client,
            round=task.round,
            attempt=task.attempt,
            assignment=order.assignment,
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
            raise Refused(_too_few(self.terms.smallest_count))
        return work

    def _until(self, order: TrainRequest) -> Callable[[], None]:
        """Return what ends training once the order's seconds are over."""
        until = time.monotonic() + order.seconds

        def check() -> None:
            if time.monotonic() > until:
                raise Late

        return check

    # --- scores ---

    def marks(self, questions: tuple[EvaluateQuery, ...]) -> list[ClientMetrics]:
        """Return the scores that are asked for, of parts with enough examples to tell them."""
        model = self.models.whole()
        work = self.prepare(model)
        settings, asked = self.evaluation, []
        for one in questions:
            here = [work[id] for id in one.clients if id in work]
            told = [c.id for c in here if self._enough(c, one.part, settings.examples or None)]
            texts = one.texts and all(self._enough(c, one.part, settings.generate) for c in here)
            asked.append(EvaluateQuery(one.adapter, tuple(told), one.part, texts))
        return LocalEvaluator(model, work, settings).evaluate(asked)


def _too_few(least: int) -> str:
    return f"limits.smallest_count = {least}, and it has fewer training examples"
