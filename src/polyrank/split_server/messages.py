"""Packets of the split server's process: its training jobs and their results.

Both are packets that travel to clients too: a job is written as a train request, and what was
trained as a train result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter, Dense
from polyrank.errors import PacketError, PolyrankError
from polyrank.planning.traffic import WireBytes
from polyrank.protocol.adapters import read_adapter, write_adapter
from polyrank.protocol.json_fields import refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import WITH_TENSORS, SizeLimits
from polyrank.protocol.train_request import TrainRequest, read_train_request, write_train_request
from polyrank.protocol.train_result import read_train_result, write_train_result
from polyrank.rounds.messages import TrainTask
from polyrank.split_server.interface import OpenRound, ServerPartResult
from polyrank.training import LocalTraining, Scoring
from polyrank.training.split import ServerPartJob


def write_round(work: OpenRound) -> tuple[dict[str, Any], Iterator[bytes]]:
    """Return a round as JSON, and as packets: one for each merged site, then one for each job.

    Sums at sites that no job trains are left out.
    """
    trained = {site for job in work.jobs for site in job.assignment.start}
    merged = [(site, dense) for site, dense in work.merged.items() if site in trained]
    fields = {
        "round": work.round,
        "attempt": work.attempt,
        "tokens": {job.client: work.tokens[job.client] for job in work.jobs},
        "seconds": work.seconds,
        "merged": len(merged),
        "jobs": [training_fields(job) for job in work.jobs],
    }
    jobs = [write_job(job) for job in work.jobs]

    def packets() -> Iterator[bytes]:
        for site, dense in merged:
            yield write_merged(site, dense)
        yield from jobs

    return fields, packets()


def read_round(fields: Mapping[str, Any], packets: deque[bytearray]) -> OpenRound:
    """Return the round that `write_round` wrote; PacketError for anything else.

    The packets are taken from the queue as they are read, so that their memory is free.
    """
    merged: dict[str, Dense] = {}
    for _ in range(fields["merged"]):
        merged |= read_merged(packets.popleft())
    jobs = [read_job(packets.popleft(), training) for training in fields["jobs"]]
    return OpenRound(
        round=fields["round"],
        attempt=fields["attempt"],
        jobs=jobs,
        merged=Adapter(merged),
        tokens=fields["tokens"],
        seconds=fields["seconds"],
    )


def write_job(job: ServerPartJob) -> bytes:
    """Return the train request of a job, without how it is trained: see `training_fields`."""
    task = TrainTask(job.client, job.round, job.attempt, job.seed, job.assignment, job.cut)
    whole, scoring = job.assignment.hash(), job.scoring
    return write_train_request(TrainRequest(task, whole, scoring.every, scoring.metric, 0.0))


def training_fields(job: ServerPartJob) -> dict[str, Any]:
    """Return how a job is trained, and in how many steps, as JSON."""
    return {"local": asdict(job.local), "steps": job.steps}


def read_job(data: bytes | bytearray, training: object) -> ServerPartJob:
    """Return the job of a train request and its `training_fields`; PacketError for others."""
    request = read_train_request(data)
    task = request.task
    if task.cut is None or not isinstance(training, Mapping):
        raise refusal("train request packet, cut", "that of a split client", "none")
    try:
        given = dict(training["local"])
        local = LocalTraining(**{**given, "betas": tuple(given["betas"])})
        steps = int(training["steps"])
    except (PolyrankError, KeyError, TypeError, ValueError) as error:
        raise PacketError(
            f"server part of {task.client!r}: its training settings cannot be read: {error}"
        ) from error
    return ServerPartJob(
        client=task.client,
        round=task.round,
        attempt=task.attempt,
        cut=task.cut,
        assignment=task.assignment,
        local=local,
        seed=task.seed,
        steps=steps,
        scoring=Scoring(request.score_every, request.metric),
    )


def write_merged(site: str, dense: Dense) -> bytes:
    """Return the packet of what is merged into the base at one site."""
    return pack("merged", {}, write_adapter("merged", {site: dense}))


def read_merged(data: bytes | bytearray) -> dict[str, Dense]:
    """Return what `write_merged` wrote; PacketError for anything else."""
    packet = Packet(data, "merged", WITH_TENSORS)
    merged: dict[str, Dense] = {}
    for site, delta in read_adapter(packet, "merged").items():
        if not isinstance(delta, Dense):
            raise refusal(f"{packet.place}, {site!r}", "Dense", type(delta).__name__)
        merged[site] = delta
    packet.close()
    return merged


@dataclass(frozen=True)
class ExpectedResult:
    """What may come back for a job: writes the result of a client, and reads and checks it."""

    client: str
    round: int
    attempt: int
    assignment: Assignment

    @staticmethod
    def of(job: ServerPartJob) -> ExpectedResult:
        """Return what may come back for this job."""
        return ExpectedResult(job.client, job.round, job.attempt, job.assignment)

    @property
    def size_limits(self) -> SizeLimits:
        """How large the result's packet may be."""
        return SizeLimits.of(self.assignment, len(self.assignment.start))

    def write(self, result: ServerPartResult) -> bytes:
        """Return what was trained as the packet of a train result."""
        update = Update(
            client=self.client,
            round=self.round,
            attempt=self.attempt,
            assignment=self.assignment.hash(),
            examples=1,  # Only the client knows how many there are.
            adapter=Adapter(result.adapter),
            metrics={"up": float(result.traffic.up), "down": float(result.traffic.down)},
            importance=dict(result.importance),
        )
        return write_train_result(update, self.assignment)

    def read(self, data: bytes | bytearray) -> ServerPartResult:
        """Return what `write` wrote; PacketError for any other result."""
        update = read_train_result(data, self.size_limits, self.assignment)
        expected = (self.client, self.round, self.attempt)
        came = (update.client, update.round, update.attempt)
        if not isinstance(update, Update) or came != expected:
            raise refusal("train result packet", f"what was trained of {expected}", repr(came))
        extra = update.importance.keys() - self.assignment.start.keys()
        if extra:
            raise refusal("train result packet, importance", "sites of the job", sorted(extra)[:3])
        traffic = WireBytes(int(update.metrics["up"]), int(update.metrics["down"]))
        return ServerPartResult(update.adapter, update.importance, traffic)
